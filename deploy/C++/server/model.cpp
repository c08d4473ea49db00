#include "model.h"

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <set>

#include "error.h"

namespace {

using google::protobuf::ListValue;
using google::protobuf::Struct;
using google::protobuf::Value;

const Value& field(const Struct& object, const std::string& name) {
  const auto found = object.fields().find(name);
  return found == object.fields().end() ? Value::default_instance() : found->second;
}

const Value& element(const ListValue& list, int index) {
  return index < list.values_size() ? list.values(index) : Value::default_instance();
}

// Ids of the values that an operation reads ("I") or writes ("O"): a list of objects, or one object.
int64_t value_id(const Struct& operation, const std::string& side, int index) {
  const Value& values = field(operation, side);
  const Struct& object =
      values.has_list_value() ? element(values.list_value(), index).struct_value() : values.struct_value();
  return static_cast<int64_t>(field(object, "%").number_value());
}

// The shape of the first value that an operation writes.
std::vector<int64_t> shape(const Struct& operation) {
  const Value& values = field(operation, "O");
  const Struct& object =
      values.has_list_value() ? element(values.list_value(), 0).struct_value() : values.struct_value();
  const ListValue& type = field(field(object, "TT").struct_value(), "D").list_value();
  std::vector<int64_t> sizes;
  for (const Value& size : element(type, 1).list_value().values())
    sizes.push_back(static_cast<int64_t>(size.number_value()));
  return sizes;
}

const Value& attribute(const Struct& operation, const std::string& name) {
  for (const Value& value : field(operation, "A").list_value().values())
    if (field(value.struct_value(), "N").string_value() == name)
      return field(field(value.struct_value(), "AT").struct_value(), "D");
  return Value::default_instance();
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw InputError(path + ": can't be read; export the model again with export_to_serving.py");
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

void read_graph(Model& model) {
  Struct root;
  if (!google::protobuf::util::JsonStringToMessage(read_file(model.graph_file), &root).ok())
    throw InputError(model.graph_file + ": isn't a graph that Paddle 3 exported; export the model again");
  const Struct& program = field(root, "program").struct_value();
  const Struct& region = element(field(program, "regions").list_value(), 0).struct_value();
  const Struct& block = element(field(region, "blocks").list_value(), 0).struct_value();

  std::map<int64_t, int64_t> table_rows;                  // weights and their first size
  std::map<int64_t, double> constants;                    // values that a "full" writes
  std::set<int64_t> uniform;                              // tensors of one number throughout, whatever the texts are
  std::optional<int64_t> input_ids, token_type_ids, pad;  // value ids
  for (const Value& value : field(block, "ops").list_value().values()) {
    const Struct& operation = value.struct_value();
    const std::string& kind = field(operation, "#").string_value();
    const int64_t output = value_id(operation, "O", 0);
    if (kind == "p") {
      const auto sizes = shape(operation);
      if (!sizes.empty()) table_rows[output] = sizes[0];
      model.weights.push_back(element(field(operation, "A").list_value(), 3).string_value());
    } else if (kind == "1.data") {
      const std::string& name = attribute(operation, "name").string_value();
      if (name == "input_ids") input_ids = output;
      if (name == "token_type_ids") token_type_ids = output;
    } else if (kind == "1.full") {
      constants[output] = attribute(operation, "value").number_value();
      uniform.insert(output);
    } else if (kind == "1.full_with_tensor" || kind == "1.full_like" ||
               ((kind == "1.scale" || kind == "1.cast") && uniform.count(value_id(operation, "I", 0)))) {
      uniform.insert(output);
    } else if (kind == "1.equal" && input_ids && value_id(operation, "I", 0) == *input_ids) {
      pad = value_id(operation, "I", 1);  // the attention mask: input_ids == pad
    } else if (kind == "1.embedding") {
      const int64_t rows = table_rows[value_id(operation, "I", 1)];
      const int64_t ids = value_id(operation, "I", 0);
      if (uniform.count(ids)) continue;  // ERNIE 3.0's task types: one row for all tokens
      int64_t& limit = input_ids && ids == *input_ids             ? model.vocabulary_size
                       : token_type_ids && ids == *token_type_ids ? model.token_types
                                                                  : model.max_length;
      limit = limit == 0 ? rows : std::min(limit, rows);
    } else if (kind == "1.fetch") {
      const auto sizes = shape(operation);
      if (sizes.size() == 2) model.dimension = static_cast<int>(sizes[1]);
    }
  }
  if (!model.vocabulary_size || !model.token_types || !model.max_length || model.dimension <= 0 || !pad ||
      !constants.count(*pad))
    throw InputError(model.graph_file + ": isn't the graph of a model of this project; export it with export_model.py");
  model.pad_id = static_cast<int64_t>(constants[*pad]);
}
