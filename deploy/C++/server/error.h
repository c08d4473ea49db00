// The two kinds of errors: a request that can't be answered, and a server that can't start.
#pragma once

#include <stdexcept>
#include <string>

// Numbers of brpc's errno.proto, which err_no and baidu_std's error_code carry.
enum class RpcError : int {
  kNoService = 1001,
  kNoMethod = 1002,
  kBadRequest = 1003,
  kInternal = 2001,
  kShuttingDown = 2003,
  kOverloaded = 2004,
};

// Says what is wrong with a request, over HTTP by a status and over baidu_std by a number.
class RequestError : public std::runtime_error {
 public:
  RequestError(int http_status, RpcError rpc_error, const std::string& message)
      : std::runtime_error(message), http_status(http_status), rpc_error(rpc_error) {}

  static RequestError bad(const std::string& message) { return {400, RpcError::kBadRequest, message}; }
  static RequestError too_large(const std::string& message) { return {413, RpcError::kBadRequest, message}; }
  static RequestError overloaded(const std::string& message) { return {503, RpcError::kOverloaded, message}; }
  static RequestError shutting_down() { return {503, RpcError::kShuttingDown, "the server is shutting down"}; }
  static RequestError internal(const std::string& message) { return {500, RpcError::kInternal, message}; }

  int http_status;
  RpcError rpc_error;
};

// The user's options or files can't be used: one line on stderr, exit code 2.
class InputError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};
