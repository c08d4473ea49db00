// Bodies: from the bytes of a request to the rows of token ids in it, and from vectors to the bytes of a response.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "error.h"
#include "model.h"

constexpr size_t kMaxTexts = 1024;  // in one request

enum class Format { kProto, kJson };

// The texts of a request, without the padding at their ends.
struct Texts {
  struct Row {
    size_t start, length;
  };
  std::vector<int64_t> input_ids, token_type_ids;  // of all rows, one after the other
  std::vector<Row> rows;
  uint64_t log_id = 0;
  bool as_bytes = false;  // they came as tensor_content, and so go the vectors
};

// Throws RequestError, as the next ones do.
Texts parse_request(std::string_view body, Format format, const Model& model);

// vectors: [texts, dimension]
std::string format_response(const std::vector<float>& vectors, const Texts& texts, Format format, const Model& model);
std::string format_error(const RequestError& error, Format format);

// gzip and zlib alike; at most max_bytes come out.
std::string decompress(std::string_view data, size_t max_bytes);
std::string compress_gzip(std::string_view data);
