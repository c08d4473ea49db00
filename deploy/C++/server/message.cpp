#include "message.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/util/json_util.h>
#include <google/protobuf/util/type_resolver_util.h>
#include <google/protobuf/wire_format_lite.h>
#include <zlib.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "general_model_service.pb.h"

namespace {

using baidu::paddle_serving::predictor::general_model::Request;
using baidu::paddle_serving::predictor::general_model::Response;
using baidu::paddle_serving::predictor::general_model::Tensor;
using google::protobuf::FieldDescriptor;
using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;

constexpr int kMaxMessages = 64;  // tensors and strings in a request, each of which costs more memory than bytes
constexpr int kMaxDepth = 8;      // of JSON; a request has 4: the list of a tensor in the list of them
constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";  // which some editors and clients put before JSON
enum ElementType { kInt64 = 0, kFloat32 = 1, kInt32 = 2 };

bool has_its_wire_type(uint32_t tag, const FieldDescriptor& field) {
  const auto found = WireFormatLite::GetTagWireType(tag);
  const auto type = static_cast<WireFormatLite::FieldType>(field.type());
  return found == WireFormatLite::WireTypeForFieldType(type) ||
         (field.is_packable() && found == WireFormatLite::WIRETYPE_LENGTH_DELIMITED);
}

// Refuses what would take far more memory as messages than it takes on the wire: fields that the protocol doesn't
// have, and very many small tensors or strings.
void check_wire(CodedInputStream& input, const google::protobuf::Descriptor& type, int& messages) {
  while (const uint32_t tag = input.ReadTag()) {
    const FieldDescriptor* field = type.FindFieldByNumber(WireFormatLite::GetTagFieldNumber(tag));
    if (!field || !has_its_wire_type(tag, *field))
      throw RequestError::bad("the body isn't a Request: it has a field that the protocol lacks");
    if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) {
      if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING && ++messages > kMaxMessages)
        throw RequestError::bad("the request has too many strings");
      if (!WireFormatLite::SkipField(&input, tag)) throw RequestError::bad("the body isn't a Request");
      continue;
    }
    uint32_t size;
    if (!input.ReadVarint32(&size)) throw RequestError::bad("the body isn't a Request");
    if (++messages > kMaxMessages) throw RequestError::bad("the request has too many tensors");
    const auto limit = input.PushLimit(static_cast<int>(size));
    check_wire(input, *field->message_type(), messages);
    input.PopLimit(limit);
  }
  if (!input.ConsumedEntireMessage()) throw RequestError::bad("the body isn't a Request");
}

google::protobuf::util::TypeResolver& type_resolver() {
  static const std::unique_ptr<google::protobuf::util::TypeResolver> resolver(
      google::protobuf::util::NewTypeResolverForDescriptorPool("type.googleapis.com",
                                                               google::protobuf::DescriptorPool::generated_pool()));
  return *resolver;
}

// Protobuf's JSON parser keeps hundreds of bytes for each bracket that is open.
void check_depth(std::string_view json) {
  int depth = 0;
  char quote = 0;  // that ends the string, 0 outside of one
  for (size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (quote) {
      if (c == quote) quote = 0;
      if (c == '\\') ++i;
    } else if (c == '"' || c == '\'') {  // protobuf's parser takes both
      quote = c;
    } else if (c == '[' || c == '{')
      ++depth;
    else if (c == ']' || c == '}')
      --depth;
    if (depth > kMaxDepth) throw RequestError::bad("the body isn't a Request in JSON: it is nested too deeply");
  }
}

std::string json_to_wire(std::string_view json) {
  if (json.substr(0, kByteOrderMark.size()) == kByteOrderMark) json.remove_prefix(kByteOrderMark.size());
  check_depth(json);
  static const std::string url = "type.googleapis.com/" + Request::descriptor()->full_name();
  std::string wire;
  const auto status = google::protobuf::util::JsonToBinaryString(
      &type_resolver(), url, google::protobuf::StringPiece(json.data(), json.size()), &wire);
  if (!status.ok()) {
    const std::string reason(status.message().data(), std::min<size_t>(status.message().size(), 200));
    throw RequestError::bad("the body isn't a Request in JSON: " + reason);
  }
  return wire;
}

Request parse_wire(std::string_view wire) {
  CodedInputStream input(reinterpret_cast<const uint8_t*>(wire.data()), static_cast<int>(wire.size()));
  int messages = 0;
  check_wire(input, *Request::descriptor(), messages);
  Request request;
  if (!request.ParseFromArray(wire.data(), static_cast<int>(wire.size())))
    throw RequestError::bad("the body isn't a Request");
  return request;
}

const Tensor& find_tensor(const Request& request, const std::string& name, const std::string& alias) {
  const Tensor* found = nullptr;
  for (const Tensor& tensor : request.tensor()) {
    if (tensor.alias_name() != alias && tensor.name() != name && tensor.alias_name() != name) continue;
    if (found) throw RequestError::bad("the tensor " + alias + " is there twice");
    found = &tensor;
  }
  if (!found) throw RequestError::bad("the tensor " + alias + " is missing");
  return *found;
}

struct Shape {
  size_t rows, length;
  size_t size() const { return rows * length; }
};

Shape check_shape(const Tensor& tensor, const std::string& alias, const Model& model) {
  const auto& sizes = tensor.shape();
  if (sizes.size() != 2 || sizes[0] < 1 || sizes[1] < 1)
    throw RequestError::bad("the shape of " + alias + " isn't [texts, tokens]");
  if (static_cast<size_t>(sizes[0]) > kMaxTexts)
    throw RequestError::too_large(std::to_string(sizes[0]) + " texts, where a request holds " +
                                  std::to_string(kMaxTexts) + " at most");
  if (sizes[1] > model.max_length)
    throw RequestError::bad(std::to_string(sizes[1]) + " tokens a text, where the model takes " +
                            std::to_string(model.max_length) + " at most");
  return {static_cast<size_t>(sizes[0]), static_cast<size_t>(sizes[1])};
}

template <typename Number>
std::vector<int64_t> widen(const char* data, size_t count) {
  std::vector<int64_t> elements(count);
  for (size_t i = 0; i < count; ++i) {
    Number number;
    std::memcpy(&number, data + i * sizeof(Number), sizeof(Number));
    elements[i] = number;
  }
  return elements;
}

// The elements of a tensor of int64 or int32, given as numbers or as bytes.
std::vector<int64_t> elements(const Tensor& tensor, const std::string& alias, size_t count) {
  const bool wide = tensor.elem_type() == kInt64;
  if (!wide && tensor.elem_type() != kInt32)
    throw RequestError::bad("elem_type of " + alias + " is " + std::to_string(tensor.elem_type()) +
                            ", where token ids are 0 (int64) or 2 (int32)");
  const auto check = [&](size_t found) {
    if (found != count)
      throw RequestError::bad(alias + " has " + std::to_string(found) + " elements, where its shape says " +
                              std::to_string(count));
  };
  const std::string& bytes = tensor.tensor_content();
  if (!bytes.empty()) {
    const size_t width = wide ? sizeof(int64_t) : sizeof(int32_t);
    if (tensor.int64_data_size() || tensor.int_data_size() || bytes.size() % width)
      throw RequestError::bad("tensor_content of " + alias + " isn't its elements");
    check(bytes.size() / width);
    return wide ? widen<int64_t>(bytes.data(), count) : widen<int32_t>(bytes.data(), count);
  }
  if (wide) {
    check(static_cast<size_t>(tensor.int64_data_size()));
    return {tensor.int64_data().begin(), tensor.int64_data().end()};
  }
  check(static_cast<size_t>(tensor.int_data_size()));
  return {tensor.int_data().begin(), tensor.int_data().end()};
}

void check_ids(const std::vector<int64_t>& ids, int64_t limit, const std::string& alias) {
  for (const int64_t id : ids)
    if (id < 0 || id >= limit)
      throw RequestError::bad(alias + " holds " + std::to_string(id) + ", where the model knows 0 to " +
                              std::to_string(limit - 1));
}

void check_fetch_names(const Request& request, const Model& model) {
  for (const std::string& name : request.fetch_var_names())
    if (name != model.output_alias && name != model.output_name)
      throw RequestError::bad("fetch_var_names holds something that the model doesn't give; it gives " +
                              model.output_alias);
}

std::string serialize(const Response& response, Format format) {
  if (format == Format::kProto) return response.SerializeAsString();
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  std::string json;
  if (!google::protobuf::util::MessageToJsonString(response, &json, options).ok())
    throw RequestError::internal("the response can't be written as JSON");
  return json;
}

}  // namespace

Texts parse_request(std::string_view body, Format format, const Model& model) {
  const Request request = format == Format::kProto ? parse_wire(body) : parse_wire(json_to_wire(body));
  check_fetch_names(request, model);
  const Tensor& ids = find_tensor(request, "input_ids", model.input_ids_alias);
  const Tensor& types = find_tensor(request, "token_type_ids", model.token_type_ids_alias);
  if (request.tensor_size() != 2) throw RequestError::bad("the request has tensors that the model doesn't take");
  const Shape shape = check_shape(ids, model.input_ids_alias, model);
  const Shape types_shape = check_shape(types, model.token_type_ids_alias, model);
  if (shape.rows != types_shape.rows || shape.length != types_shape.length)
    throw RequestError::bad("the tensors' shapes differ");

  Texts texts;
  texts.log_id = request.log_id();
  texts.as_bytes = !ids.tensor_content().empty();
  texts.input_ids = elements(ids, model.input_ids_alias, shape.size());
  texts.token_type_ids = elements(types, model.token_type_ids_alias, shape.size());
  check_ids(texts.input_ids, model.vocabulary_size, model.input_ids_alias);
  check_ids(texts.token_type_ids, model.token_types, model.token_type_ids_alias);
  for (size_t row = 0; row < shape.rows; ++row) {
    const size_t start = row * shape.length;
    size_t length = shape.length;
    while (length > 0 && texts.input_ids[start + length - 1] == model.pad_id) --length;
    if (length == 0) throw RequestError::bad("text " + std::to_string(row) + " is nothing but padding");
    texts.rows.push_back({start, length});
  }
  return texts;
}

std::string format_response(const std::vector<float>& vectors, const Texts& texts, Format format, const Model& model) {
  Response response;
  response.set_log_id(texts.log_id);
  auto* output = response.add_outputs();
  output->set_engine_name("GeneralInferOp_0");
  Tensor* tensor = output->add_tensor();
  tensor->set_name(model.output_name);
  tensor->set_alias_name(model.output_alias);
  tensor->set_elem_type(kFloat32);
  tensor->add_shape(static_cast<int>(vectors.size()) / model.dimension);
  tensor->add_shape(model.dimension);
  if (texts.as_bytes)
    tensor->set_tensor_content(vectors.data(), vectors.size() * sizeof(float));
  else
    tensor->mutable_float_data()->Add(vectors.begin(), vectors.end());
  return serialize(response, format);
}

std::string format_error(const RequestError& error, Format format) {
  Response response;
  response.set_err_no(static_cast<int>(error.rpc_error));
  response.set_err_msg(error.what());
  return serialize(response, format);
}

std::string decompress(std::string_view data, size_t max_bytes) {
  z_stream stream{};
  if (inflateInit2(&stream, 15 + 32) != Z_OK) throw RequestError::internal("zlib can't start");  // 32: finds out which
  const std::unique_ptr<z_stream, int (*)(z_stream*)> owner(&stream, inflateEnd);
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(data.data()));
  stream.avail_in = static_cast<uInt>(data.size());
  std::string out;
  char chunk[1 << 16];
  int result = Z_OK;
  while (result == Z_OK) {
    stream.next_out = reinterpret_cast<Bytef*>(chunk);
    stream.avail_out = sizeof(chunk);
    result = inflate(&stream, Z_NO_FLUSH);
    out.append(chunk, sizeof(chunk) - stream.avail_out);
    if (out.size() > max_bytes) throw RequestError::too_large("the body is too large once it is decompressed");
  }
  if (result != Z_STREAM_END || stream.avail_in) throw RequestError::bad("the compressed body is damaged");
  return out;
}

std::string compress_gzip(std::string_view data) {
  z_stream stream{};
  if (deflateInit2(&stream, Z_BEST_SPEED, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) != Z_OK)  // 16: gzip
    throw RequestError::internal("zlib can't start");
  const std::unique_ptr<z_stream, int (*)(z_stream*)> owner(&stream, deflateEnd);
  std::string out(deflateBound(&stream, data.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(data.data()));
  stream.avail_in = static_cast<uInt>(data.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  if (deflate(&stream, Z_FINISH) != Z_STREAM_END) throw RequestError::internal("zlib failed");
  out.resize(stream.total_out);
  return out;
}
