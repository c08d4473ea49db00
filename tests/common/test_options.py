"""The options that scripts share, and how functions get their values."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from common.cli import ArgumentParser
from common.options import add_checkpoint_args, add_device_arg, add_evaluation_file_args, call, pick


@dataclass
class Box:
    """Has parameters that are options, and one that isn't."""

    width: int
    height: int = 1
    color: str = "red"


def test_pick_takes_the_options_that_are_parameters() -> None:
    args = argparse.Namespace(width=3, height=4, depth=5)
    assert pick(args, Box) == {"width": 3, "height": 4}
    assert pick(args, Box, height=6, color="blue") == {"width": 3, "height": 6, "color": "blue"}


def test_call_leaves_defaults_and_refuses_what_is_no_parameter() -> None:
    args = argparse.Namespace(width=3)
    assert call(Box, args) == Box(3, 1, "red")
    with pytest.raises(TypeError, match="depth"):
        call(Box, args, depth=5)
    with pytest.raises(TypeError, match="width"):
        call(Box, argparse.Namespace())


def parsed(add: Callable[[ArgumentParser], None], *arguments: str) -> argparse.Namespace:
    parser = ArgumentParser()
    add(parser)
    return parser.parse_args(arguments)


def test_params_path_is_required_without_a_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(lambda parser: add_checkpoint_args(parser, "checkpoint")).params_path == "checkpoint"
    with pytest.raises(SystemExit) as stopped:
        parsed(add_checkpoint_args)
    assert stopped.value.code == 2
    assert "--params_path" in capsys.readouterr().err


def test_a_device_without_a_default_is_found_later() -> None:
    assert parsed(lambda parser: add_device_arg(parser, None)).device is None
    assert parsed(lambda parser: add_device_arg(parser, "gpu")).device == "gpu"


@pytest.mark.parametrize("name", ["--similar_text_pair_file", "--similar_text_pair"])
def test_both_names_of_the_original_for_the_pairs(name: str) -> None:
    assert parsed(add_evaluation_file_args, name, "pairs.csv").similar_text_pair_file == "pairs.csv"


def test_training_has_the_original_s_default_files() -> None:
    args = parsed(lambda parser: add_evaluation_file_args(parser, train=True))
    assert (args.similar_text_pair_file, args.corpus_file) == ("./recall/dev.csv", "./recall/corpus.csv")
    assert parsed(add_evaluation_file_args).corpus_file is None
