#!/bin/sh
# Downloads the literature search dataset of the PaddleNLP project; see --help.
set -eu

url=${LITERATURE_SEARCH_DATA_URL:-https://bj.bcebos.com/v1/paddlenlp/data/literature_search_data.zip}
files='train.csv dev.csv test.csv corpus.csv'

usage() {
    cat <<'EOF'
usage: sh scripts/download_data.sh [DIR]          download the dataset's recall/ folder into DIR
       sh scripts/download_data.sh --check [DIR]  only check that DIR/recall is complete

DIR is the repository root by default. A complete DIR/recall is left as it is, and no file is overwritten. An interrupted
download is resumed. Without a network on this machine, put literature_search_data.zip into DIR yourself.

Environment: LITERATURE_SEARCH_DATA_URL is another address of the archive.
EOF
}

fail() {
    echo "download_data: error: $*" >&2
    exit 2
}

# Prints the dataset's files that are missing in the folder $1.
lacking() {
    for file in $files; do
        [ -f "$1/$file" ] && [ -s "$1/$file" ] || printf ' %s' "$file"
    done
}

check() {
    [ -d "$dir/recall" ] || fail "there is no folder $dir/recall; it should hold $files"
    lacks=$(lacking "$dir/recall")
    [ -z "$lacks" ] || fail "$dir/recall lacks (or holds empty):$lacks"
    echo "download_data: $dir/recall is complete: $files"
}

is_archive() { "$python" -m zipfile -l "$1" >/dev/null 2>&1; }

# Downloads $url to the file $1, and resumes an earlier download.
download() {
    is_archive "$1.part" || {
        if command -v curl >/dev/null; then
            quiet=
            [ -t 2 ] || quiet=-sS
            curl -fL $quiet -C - -o "$1.part" "$url"
        elif command -v wget >/dev/null; then
            wget -nv -c -O "$1.part" "$url"
        else
            fail "neither curl nor wget is installed (Debian, Ubuntu: sudo apt-get install curl)"
        fi || fail "could not download $url; check the network or the proxy (https_proxy) and run this again, or" \
            "download it elsewhere, put it into $dir and run this again"
        is_archive "$1.part" || {
            rm -f "$1.part"
            fail "what $url gave is not a ZIP archive; it has been deleted, run this again"
        }
    }
    mv "$1.part" "$1"
}

only_check=
case ${1:-} in
-h | --help) usage && exit ;;
--check) only_check=1 && shift ;;
-*) fail "unknown option '$1'; sh scripts/download_data.sh --help lists them" ;;
esac
[ $# -le 1 ] || fail "one folder at most, not $*"
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
dir=${1:-$root}

if [ -n "$only_check" ] || { [ -d "$dir/recall" ] && [ -z "$(lacking "$dir/recall")" ]; }; then
    check
    exit
fi
[ ! -e "$dir/recall" ] || rmdir "$dir/recall" 2>/dev/null ||
    fail "$dir/recall is there but incomplete (it lacks$(lacking "$dir/recall")), and nothing is overwritten;" \
        "move it away or name another folder"

python=$root/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3) || fail "no Python to unpack the archive with; run sh scripts/setup.sh first"

mkdir -p "$dir"
archive=$dir/literature_search_data.zip
unpacked=$dir/.literature_search_data
trap 'rm -rf "$unpacked" ${downloaded:+"$archive"}' EXIT # an archive that the user put there is kept
downloaded=
if [ ! -e "$archive" ]; then
    echo "download_data: downloading $url"
    download "$archive"
    downloaded=1
fi
rm -rf "$unpacked"
"$python" -m zipfile -e "$archive" "$unpacked" 2>/dev/null || fail "could not unpack $archive: damaged, or the disk is full"
# In some archives recall/ is inside another folder; macOS adds a shadow tree.
recall=$(find "$unpacked" -type d -name recall -not -path '*/__MACOSX/*' | head -n 1)
[ -n "$recall" ] || fail "$archive has no folder recall/; is it the literature search dataset?"
lacks=$(lacking "$recall")
[ -z "$lacks" ] || fail "the folder recall/ of $archive lacks (or holds empty):$lacks"
mv "$recall" "$dir/recall"
check
