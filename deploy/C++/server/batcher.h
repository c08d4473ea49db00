// Batches the texts of concurrent requests by length and runs them, on a thread for each predictor.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "error.h"
#include "message.h"

// Writes the vectors, [rows, dimension], of padded token ids, [rows, length]. Throws RequestError.
using Embed = std::function<void(const std::vector<int64_t>& input_ids, const std::vector<int64_t>& token_type_ids,
                                 int rows, int length, float* vectors)>;

// A request on its way through the predictors. `done` is called once, on a predictor's thread, unless it's abandoned.
struct Job {
  Texts texts;
  std::vector<float> vectors;  // [texts, dimension]
  std::optional<RequestError> error;
  std::function<void()> done;
  size_t missing = 0;  // texts without a vector so far
};

// The tokens that take as long as a call does besides its texts: few with a large model, hundreds with a small one.
size_t call_cost_in_tokens(const Embed& embed, const Model& model);

class Batcher {
 public:
  // max_waiting: texts that may wait for a predictor; max_batch: texts in a batch; call_cost: in tokens. To spare a
  // call, texts are padded by up to its cost, and fewer tokens wait until no predictor is at work.
  Batcher(std::vector<Embed> predictors, const Model& model, size_t max_batch, size_t max_waiting, size_t call_cost);
  // Runs what is waiting, then returns.
  ~Batcher();

  // Throws RequestError if too many texts are waiting.
  void submit(std::shared_ptr<Job> job);

 private:
  struct Text {
    std::shared_ptr<Job> job;
    size_t row;
    bool taken = false;
    size_t length() const { return job->texts.rows[row].length; }
  };
  using TextPointer = std::shared_ptr<Text>;

  void work(const Embed& embed);
  bool batch_is_due() const;
  std::vector<TextPointer> next_batch();
  void run(const Embed& embed, const std::vector<TextPointer>& batch);

  const Model& model_;
  const size_t max_batch_, max_waiting_, call_cost_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;
  std::deque<TextPointer> by_age_;                // some of them taken already
  std::multimap<size_t, TextPointer> by_length_;  // those that wait
  size_t waiting_tokens_ = 0;                     // of those
  size_t running_ = 0;                            // batches
  std::vector<std::thread> threads_;
};
