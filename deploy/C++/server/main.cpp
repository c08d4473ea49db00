// Serves an exported model as Paddle Serving's C++ server does; Paddle Serving starts it as SERVING_BIN.

#include <dlfcn.h>
#include <google/protobuf/stubs/logging.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <optional>

#include "batcher.h"
#include "cores.h"
#include "error.h"
#include "options.h"
#include "predictor.h"
#include "server.h"

#if defined(__SANITIZE_ADDRESS__)
// libpaddle.so registers its operators as it is loaded and never frees them, and mixes its libraries' ways to allocate.
extern "C" const char* __lsan_default_suppressions() {
  return "leak:libpaddle\nleak:libphi\nleak:libdnnl\nleak:libiomp5\n";
}
extern "C" const char* __asan_default_options() { return "alloc_dealloc_mismatch=0:print_suppressions=0"; }
#endif

namespace {

constexpr int kInputErrorExitCode = 2;
constexpr int kErrorExitCode = 1;
constexpr size_t kMaxBatch = 32;
constexpr char kPredictorLibrary[] = "libserving_predictor.so";

// The functions of libserving_predictor.so, which lies beside this program.
class PredictorLibrary {
 public:
  PredictorLibrary() {
    const std::string path = std::filesystem::canonical("/proc/self/exe").replace_filename(kPredictorLibrary);
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle_) throw InputError(std::string(dlerror()) + "; build the server again with deploy/C++/build.sh");
    create = reinterpret_cast<ServingPredictorCreate*>(dlsym(handle_, "serving_predictor_create"));
    clone = reinterpret_cast<ServingPredictorClone*>(dlsym(handle_, "serving_predictor_clone"));
    run = reinterpret_cast<ServingPredictorRun*>(dlsym(handle_, "serving_predictor_run"));
    if (!create || !clone || !run)
      throw InputError(path + ": isn't of this server; build it again with deploy/C++/build.sh");
  }

  ServingPredictorCreate* create;
  ServingPredictorClone* clone;
  ServingPredictorRun* run;

 private:
  void* handle_;  // never closed: libpaddle.so can't be unloaded
};

// Predictors, each for a thread of its own.
std::vector<Embed> make_predictors(const PredictorLibrary& library, const Options& options, int count,
                                   int cpu_threads) {
  char error[1 << 14] = "";
  std::vector<const char*> weights;
  for (const std::string& name : options.model.weights) weights.push_back(name.c_str());
  const ServingPredictorOptions predictor_options{options.model.graph_file.c_str(),
                                                  options.model.weights_file.c_str(),
                                                  options.gpu_id,
                                                  options.precision,
                                                  cpu_threads,
                                                  weights.data(),
                                                  weights.size()};
  ServingPredictor* const first = library.create(&predictor_options, error, sizeof(error));
  std::vector<Embed> embeds;
  for (int i = 0; i < count; ++i) {
    ServingPredictor* const predictor =
        i == 0 || !first ? first : library.clone(first, &predictor_options, error, sizeof(error));
    if (!predictor) throw InputError(options.model.graph_file + ": Paddle can't load it: " + error);
    embeds.push_back([run = library.run, predictor, dimension = options.model.dimension](
                         const std::vector<int64_t>& input_ids, const std::vector<int64_t>& token_type_ids, int rows,
                         int length, float* vectors) {
      char reason[1 << 14] = "";
      if (run(predictor, input_ids.data(), token_type_ids.data(), rows, length, vectors, dimension, reason,
              sizeof(reason)))
        return;
      std::cerr << reason << std::endl;
      throw RequestError::internal("the model failed; the server's log says why");
    });
  }
  return embeds;
}

void run(int argc, char** argv) {
  std::optional<Options> parsed = parse_options(argc, argv);
  if (!parsed) return;
  Options& options = *parsed;
  read_graph(options.model);
  // More predictors than cores only get into each other's way; with fewer, each has several cores.
  const int cores = core_count();
  const int predictors = std::min(options.threads, cores);
  const PredictorLibrary library;
  std::vector<Embed> embeds = make_predictors(library, options, predictors, cores / predictors);
  const size_t call_cost = call_cost_in_tokens(embeds.front(), options.model);
  Batcher batcher(std::move(embeds), options.model, kMaxBatch, options.max_queued_texts, call_cost);
  const std::string host = options.host.find(':') == std::string::npos ? options.host : "[" + options.host + "]";
  serve({options.host, options.port, options.max_body_bytes, std::min(2, cores),
         std::chrono::seconds(options.idle_timeout_s)},
        options.model, batcher, [&](unsigned short port) {
          std::cout << "serving " << options.model.graph_file << " on " << host << ":" << port << " with "
                    << predictors << " predictor(s)" << std::endl;
        });
}

}  // namespace

int main(int argc, char** argv) {
  google::protobuf::SetLogHandler(nullptr);  // whoever sends bad requests would fill the log with its errors
  try {
    run(argc, argv);
  } catch (const InputError& error) {
    std::cerr << "error: " << error.what() << std::endl;
    return kInputErrorExitCode;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << std::endl;
    return kErrorExitCode;
  }
  return 0;
}
