// baidu_std, brpc's own protocol: "PRPC", body size and meta size (32 bits each, big endian), RpcMeta, payload,
// attachment. See brpc's docs/en/baidu_std.md.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "error.h"

constexpr size_t kFrameHeaderBytes = 12;
constexpr std::string_view kFrameMagic = "PRPC";

struct FrameSizes {
  size_t body, meta;  // the body holds the meta data
};

// Throws RequestError where the bytes aren't a header or announce more than max_body: nothing after them can be read.
FrameSizes parse_frame_header(std::string_view header, size_t max_body);

struct Frame {
  int64_t correlation_id = 0;
  std::string body;  // decompressed
};

// The request in a frame's body. Sets correlation_id as soon as it is known, then throws RequestError for what can't be
// answered.
void parse_frame(std::string_view body, size_t meta_size, size_t max_body, Frame& frame);

std::string format_frame(int64_t correlation_id, std::string_view payload);
std::string format_frame_error(int64_t correlation_id, const RequestError& error);
