// Paddle Inference behind a C interface: libserving_predictor.so, the only part that is linked with libpaddle.so.
//
// libpaddle.so carries a protobuf of its own. The server's protobuf is linked statically and not exported, and this
// library is loaded with dlopen(RTLD_LOCAL), so that neither sees the other's.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { SERVING_FP32, SERVING_BF16, SERVING_FP16 };

typedef struct {
  const char* graph_file;
  const char* weights_file;
  int gpu_id;     // -1: the CPU
  int precision;  // SERVING_FP32, ...
  int cpu_threads;
  const char* const* weights;  // their names in the graph
  size_t weights_count;
} ServingPredictorOptions;

typedef struct ServingPredictor ServingPredictor;

// Each function writes a message to `error` (of error_size bytes) where it returns NULL or false.
// Predictors live as long as the process. A predictor isn't to be used by two threads at a time.
typedef ServingPredictor* ServingPredictorCreate(const ServingPredictorOptions*, char* error, size_t error_size);

// A further predictor of the same model, to be made before the first one runs. On the CPU they share one copy of the
// weights; what oneDNN makes of them at the first run is each one's own.
typedef ServingPredictor* ServingPredictorClone(ServingPredictor*, const ServingPredictorOptions*, char* error,
                                                size_t error_size);

// input_ids, token_type_ids: [rows, length]; output: [rows, dimension].
typedef bool ServingPredictorRun(ServingPredictor*, const int64_t* input_ids, const int64_t* token_type_ids, int rows,
                                 int length, float* output, int dimension, char* error, size_t error_size);

ServingPredictorCreate serving_predictor_create;
ServingPredictorClone serving_predictor_clone;
ServingPredictorRun serving_predictor_run;

#ifdef __cplusplus
}
#endif
