#include "predictor.h"

#include <malloc.h>

#include <cstdio>
#include <exception>
#include <future>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "paddle_infer.h"

namespace {

constexpr uint64_t kGpuMemoryMiB = 256;  // that a predictor reserves at first, as static_graph.py has it
constexpr size_t kShapesKept = 64;       // in oneDNN's cache, as static_graph.py has it and explains

template <typename Function>
auto report_errors(char* error, size_t error_size, Function function) -> decltype(function()) {
  try {
    return function();
  } catch (const std::exception& exception) {
    std::snprintf(error, error_size, "%s", exception.what());
  } catch (...) {
    std::snprintf(error, error_size, "an unknown exception in Paddle");
  }
  return {};
}

}  // namespace

struct ServingPredictor {
  ServingPredictor(paddle_infer::Predictor* paddle_predictor, bool with_onednn)
      : predictor(paddle_predictor),
        onednn(with_onednn),
        input_ids(predictor->GetInputHandle("input_ids").release()),
        token_type_ids(predictor->GetInputHandle("token_type_ids").release()),
        output(predictor->GetOutputHandle(predictor->GetOutputNames().at(0)).release()) {}

  // With oneDNN on a thread that ends, and so clears its cache, once that holds many shapes or one of the same digits.
  bool run(int rows, int length) {
    if (!onednn) return predictor->Run();
    const auto shape = std::make_pair(rows, length);
    const auto& known = shapes.emplace(std::to_string(rows) + std::to_string(length), shape).first->second;
    if (known == shape && shapes.size() <= kShapesKept) return predictor->Run();
    shapes.clear();
    return std::async(std::launch::async, [this] { return predictor->Run(); }).get();
  }

  paddle_infer::Predictor* predictor;
  bool onednn;
  paddle_infer::Tensor* input_ids;
  paddle_infer::Tensor* token_type_ids;
  paddle_infer::Tensor* output;
  std::map<std::string, std::pair<int, int>> shapes;  // in the cache, by their digits
};

namespace {

// Lets a clone read the original's weights in place of its own, which are freed. Paddle 3.3.1 itself shares them with a
// clone in the format of Paddle 2 alone; a graph of Paddle 3 has them read from the file again. Its handles of inputs
// are those of any variable.
void share_weights(paddle_infer::Predictor* original, paddle_infer::Predictor* clone,
                   const ServingPredictorOptions& options) {
  for (size_t i = 0; i < options.weights_count; ++i) {
    const paddle_infer::Tensor* const source = original->GetInputHandle(options.weights[i]).release();
    paddle_infer::PlaceType place;
    int size;
    const float* const data = source->data<float>(&place, &size);
    paddle_infer::Tensor* const target = clone->GetInputHandle(options.weights[i]).release();
    target->ShareExternalData(data, source->shape(), place, paddle_infer::DataLayout::kNCHW);
  }
  malloc_trim(0);  // gives back to the system what was freed
}

}  // namespace

ServingPredictor* serving_predictor_create(const ServingPredictorOptions* options, char* error, size_t error_size) {
  return report_errors(error, error_size, [&] {
    using Precision = paddle::AnalysisConfig::Precision;
    paddle::AnalysisConfig config(options->graph_file, options->weights_file);
    config.DisableGlogInfo();
    config.EnableNewIR(true);
    config.EnableNewExecutor(true);
    config.EnableMemoryOptim(true);  // fails without the two above
    if (options->gpu_id >= 0) {
      const Precision precision = options->precision == SERVING_FP16   ? Precision::kHalf
                                  : options->precision == SERVING_BF16 ? Precision::kBf16
                                                                       : Precision::kFloat32;
      config.EnableUseGpu(kGpuMemoryMiB, options->gpu_id, precision);
      // Its kernel gives all texts the first one's mask where a batch has as many texts as tokens.
      config.DeletePass("multihead_matmul_fuse_pass");
    } else {
      config.DisableGpu();
      config.SetCpuMathLibraryNumThreads(options->cpu_threads);
      config.EnableONEDNN();
      config.SetOnednnCacheCapacity(0);
      if (options->precision == SERVING_BF16) config.EnableOnednnBfloat16();
    }
    // It is to live as long as the process, and so isn't owned.
    static auto* const predictor = new auto(paddle_infer::CreatePredictor(config));
    return new ServingPredictor(predictor->get(), options->gpu_id < 0);
  });
}

ServingPredictor* serving_predictor_clone(ServingPredictor* original, const ServingPredictorOptions* options,
                                          char* error, size_t error_size) {
  return report_errors(error, error_size, [&] {
    paddle_infer::Predictor* const clone = original->predictor->Clone(nullptr).release();
    if (options->gpu_id < 0) share_weights(original->predictor, clone, *options);
    return new ServingPredictor(clone, original->onednn);
  });
}

bool serving_predictor_run(ServingPredictor* predictor, const int64_t* input_ids, const int64_t* token_type_ids,
                           int rows, int length, float* output, int dimension, char* error, size_t error_size) {
  return report_errors(error, error_size, [&] {
    predictor->input_ids->Reshape({rows, length});
    predictor->input_ids->CopyFromCpu(input_ids);
    predictor->token_type_ids->Reshape({rows, length});
    predictor->token_type_ids->CopyFromCpu(token_type_ids);
    if (!predictor->run(rows, length)) throw std::runtime_error("Paddle's predictor failed");
    if (predictor->output->shape() != std::vector<int>{rows, dimension})
      throw std::runtime_error("the graph's output has an unexpected shape");
    predictor->output->CopyToCpu(output);
    return true;
  });
}
