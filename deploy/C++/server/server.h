// HTTP and baidu_std on one port.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "batcher.h"
#include "model.h"

struct ServerOptions {
  std::string host;
  unsigned short port;
  size_t max_body_bytes;
  int network_threads;
  std::chrono::seconds idle_timeout;  // of connections, between requests
};

// Serves until SIGTERM or SIGINT, then answers what it has taken and returns. `ready` gets the port that is listened
// on. Throws InputError if it can't listen there.
void serve(const ServerOptions& options, const Model& model, Batcher& batcher,
           const std::function<void(unsigned short port)>& ready);
