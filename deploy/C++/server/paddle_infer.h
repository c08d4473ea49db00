// The part of Paddle's C++ inference API that the server uses, declared here because the wheel ships libpaddle.so
// without its headers. The names are those of paddle_inference_api.h (Paddle 3.3, Apache License 2.0).
//
// No class is laid out here: objects come from libpaddle.so and are never destroyed or copied on this side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace paddle {

struct AnalysisConfig {
  enum class Precision { kFloat32 = 0, kInt8, kHalf, kBf16 };

  AnalysisConfig(const std::string& graph_file, const std::string& weights_file);
  ~AnalysisConfig();
  void DisableGlogInfo();
  void EnableNewIR(bool on);
  void EnableNewExecutor(bool on);
  void EnableMemoryOptim(bool on);
  void EnableONEDNN();
  void EnableOnednnBfloat16();
  void SetOnednnCacheCapacity(int shapes);
  void DisableGpu();
  void DeletePass(const std::string& name);
  void EnableUseGpu(uint64_t memory_mib, int device_id, Precision precision);
  void SetCpuMathLibraryNumThreads(int count);

 private:
  alignas(64) unsigned char storage_[1 << 16];  // more than the real object takes
};

}  // namespace paddle

namespace paddle_infer {

enum class PlaceType { kCPU = 0 };
enum class DataLayout { kNCHW = 2 };

class Tensor {
 public:
  void Reshape(const std::vector<int>& shape);
  std::vector<int> shape() const;
  template <typename T>
  void CopyFromCpu(const T* data);
  template <typename T>
  void CopyToCpu(T* data) const;
  template <typename T>
  T* data(PlaceType* place, int* size) const;
  template <typename T>
  void ShareExternalData(const T* data, const std::vector<int>& shape, PlaceType place, DataLayout layout);
  Tensor() = delete;
};

class Predictor {
 public:
  std::vector<std::string> GetInputNames();
  std::vector<std::string> GetOutputNames();
  std::unique_ptr<Tensor> GetInputHandle(const std::string& name);
  std::unique_ptr<Tensor> GetOutputHandle(const std::string& name);
  bool Run();
  std::unique_ptr<Predictor> Clone(void* stream);
  Predictor() = delete;
};

std::shared_ptr<Predictor> CreatePredictor(const paddle::AnalysisConfig& config);

}  // namespace paddle_infer
