// What the server knows of a model: the names it goes by and the limits that its graph sets.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Model {
  std::string graph_file, weights_file;
  // Names of the tensors in requests and responses; an input answers to its name and its alias.
  std::string input_ids_alias = "input_ids", token_type_ids_alias = "token_type_ids";
  std::string output_name = "output_embedding", output_alias = "output_embedding";
  std::vector<std::string> weights;  // their names in the graph
  int64_t vocabulary_size = 0;
  int64_t token_types = 0;
  int64_t max_length = 0;  // tokens a text
  int64_t pad_id = 0;
  int dimension = 0;  // of the vectors
};

// Fills in the weights' names and the limits from a graph that Paddle 3 exported. Throws InputError.
void read_graph(Model& model);
