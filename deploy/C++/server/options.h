// The command line that Paddle Serving starts SERVING_BIN with, and the files that it names.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

#include "model.h"

struct Options {
  Model model;  // without the limits of its graph
  std::string host = "127.0.0.1";
  unsigned short port = 9393;
  int threads = 4;    // predictors at most
  int gpu_id = -1;    // -1: the CPU
  int precision = 0;  // SERVING_FP32, ...
  size_t max_body_bytes = 16 << 20;
  size_t max_queued_texts = 2048;
  int idle_timeout_s = 620;  // as in serving/settings.py, which says why
};

// Nothing where the first option is -check and the others, those of paddle_serving_server.serve, suit this machine.
// Throws InputError, which names the option.
std::optional<Options> parse_options(int argc, char** argv);
