#include "frame.h"

#include "baidu_std.pb.h"
#include "general_model_service.pb.h"
#include "message.h"

namespace {

constexpr size_t kMaxMetaBytes = 4096;
enum CompressType { kNone = 0, kSnappy = 1, kGzip = 2, kZlib = 3 };

uint32_t big_endian(std::string_view bytes) {
  uint32_t number = 0;
  for (const char byte : bytes) number = number << 8 | static_cast<unsigned char>(byte);
  return number;
}

void append_big_endian(std::string& out, size_t number) {
  for (int shift = 24; shift >= 0; shift -= 8) out.push_back(static_cast<char>(number >> shift & 0xff));
}

std::string frame(const baidu_std::RpcMeta& meta, std::string_view payload) {
  const std::string meta_bytes = meta.SerializeAsString();
  std::string out(kFrameMagic);
  append_big_endian(out, meta_bytes.size() + payload.size());
  append_big_endian(out, meta_bytes.size());
  return out.append(meta_bytes).append(payload);
}

void check_method(const baidu_std::RequestMeta& request) {
  using baidu::paddle_serving::predictor::general_model::Request;
  static const std::string package = Request::descriptor()->file()->package() + ".";
  if (request.service_name() != package + "GeneralModelService" && request.service_name() != "GeneralModelService")
    throw RequestError(404, RpcError::kNoService, "the server has one service, GeneralModelService");
  if (request.method_name() != "inference")
    throw RequestError(404, RpcError::kNoMethod, "the service has one method, inference");
}

}  // namespace

FrameSizes parse_frame_header(std::string_view header, size_t max_body) {
  if (header.size() < kFrameHeaderBytes || header.substr(0, kFrameMagic.size()) != kFrameMagic)
    throw RequestError::bad("these bytes aren't a baidu_std frame");
  const FrameSizes sizes{big_endian(header.substr(4, 4)), big_endian(header.substr(8, 4))};
  if (sizes.meta > sizes.body || sizes.meta > kMaxMetaBytes)
    throw RequestError::bad("the frame's sizes don't fit together");
  if (sizes.body - sizes.meta > max_body)
    throw RequestError::too_large("the body has more than " + std::to_string(max_body) + " bytes");
  return sizes;
}

void parse_frame(std::string_view body, size_t meta_size, size_t max_body, Frame& frame) {
  baidu_std::RpcMeta meta;
  if (!meta.ParseFromArray(body.data(), static_cast<int>(meta_size)))
    throw RequestError::bad("the frame's meta data isn't an RpcMeta");
  frame.correlation_id = meta.correlation_id();
  if (!meta.has_request()) throw RequestError::bad("the frame isn't a request");
  check_method(meta.request());
  std::string_view payload = body.substr(meta_size);
  if (meta.attachment_size() < 0 || static_cast<size_t>(meta.attachment_size()) > payload.size())
    throw RequestError::bad("the frame's attachment is larger than the frame");
  payload.remove_suffix(static_cast<size_t>(meta.attachment_size()));
  switch (meta.compress_type()) {
    case kNone:
      frame.body = payload;
      break;
    case kGzip:
    case kZlib:
      frame.body = decompress(payload, max_body);
      break;
    default:
      throw RequestError::bad("compress_type " + std::to_string(meta.compress_type()) +
                              " isn't known; 0 (none), 2 (gzip) and 3 (zlib) are");
  }
}

std::string format_frame(int64_t correlation_id, std::string_view payload) {
  baidu_std::RpcMeta meta;
  meta.mutable_response()->set_error_code(0);
  meta.set_correlation_id(correlation_id);
  return frame(meta, payload);
}

std::string format_frame_error(int64_t correlation_id, const RequestError& error) {
  baidu_std::RpcMeta meta;
  meta.mutable_response()->set_error_code(static_cast<int>(error.rpc_error));
  meta.mutable_response()->set_error_text(error.what());
  meta.set_correlation_id(correlation_id);
  return frame(meta, {});
}
