// libFuzzer's entry to the parsers of what the network brings: deploy/C++/build.sh --fuzz
//
// The first byte of an input chooses the parser.

#include <cstdlib>
#include <string>

#include "frame.h"
#include "message.h"

namespace {

constexpr size_t kMaxBody = 1 << 16;

Model small_model() {
  Model model;
  model.vocabulary_size = 100;
  model.token_types = 2;
  model.max_length = 16;
  model.dimension = 4;
  return model;
}

void parse_body(std::string_view body, Format format) {
  static const Model model = small_model();
  const Texts texts = parse_request(body, format, model);
  for (const auto& row : texts.rows)
    if (row.length == 0 || row.length > 16 || row.start + row.length > texts.input_ids.size()) std::abort();
  if (texts.input_ids.size() != texts.token_type_ids.size() || texts.rows.size() > kMaxTexts) std::abort();
}

void parse_frames(std::string_view bytes) {
  const FrameSizes sizes = parse_frame_header(bytes.substr(0, kFrameHeaderBytes), kMaxBody);
  bytes.remove_prefix(kFrameHeaderBytes);
  if (bytes.size() < sizes.body) return;
  Frame frame;
  parse_frame(bytes.substr(0, sizes.body), sizes.meta, kMaxBody, frame);
  if (frame.body.size() > kMaxBody) std::abort();
  parse_body(frame.body, Format::kProto);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    switch (data[0] % 4) {
      case 0:
        parse_body(bytes, Format::kProto);
        break;
      case 1:
        parse_body(bytes, Format::kJson);
        break;
      case 2:
        parse_frames(bytes);
        break;
      default:
        parse_body(decompress(bytes, kMaxBody), Format::kProto);
    }
  } catch (const RequestError&) {
  }
  return 0;
}
