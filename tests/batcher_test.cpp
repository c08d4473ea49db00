// How the C++ server puts texts into batches, with predictors that take part in the test: test_cpp_serving.py runs it.

#include <cstdlib>
#include <iostream>

#include "batcher.h"

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::cerr << "not so: " << what << std::endl;
  std::abort();
}

// A predictor whose calls wait until the test lets them go, and which notes their shapes.
class Predictor {
 public:
  Embed embed() {
    return [this](const auto&, const auto&, int rows, int length, float*) {
      std::unique_lock lock(mutex_);
      calls_.emplace_back(rows, length);
      changed_.notify_all();
      changed_.wait(lock, [this] { return allowed_ >= calls_.size(); });
    };
  }

  void let_go(size_t calls) {
    const std::lock_guard lock(mutex_);
    allowed_ += calls;
    changed_.notify_all();
  }

  // The shapes, [rows, length], of the calls so far, once there are so many.
  std::vector<std::pair<int, int>> calls(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return calls_.size() >= count; });
    return calls_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::pair<int, int>> calls_;
  size_t allowed_ = 0;
};

Model model() {
  Model model;
  model.dimension = 1;
  model.max_length = 64;
  return model;
}

std::shared_ptr<Job> job(size_t length) {
  auto job = std::make_shared<Job>();
  job->texts.input_ids = job->texts.token_type_ids = std::vector<int64_t>(length, 1);
  job->texts.rows = {{0, length}};
  job->done = [] {};
  return job;
}

using Calls = std::vector<std::pair<int, int>>;

// The calls for texts of these lengths that come while another one, of 40 tokens, is running.
Calls calls_for(const std::vector<size_t>& lengths, size_t max_batch, size_t call_cost, size_t count) {
  const Model small = model();
  Predictor predictor;
  Calls calls;
  {
    Batcher batcher({predictor.embed()}, small, max_batch, 100, call_cost);
    batcher.submit(job(40));
    predictor.calls(1);
    for (const size_t length : lengths) batcher.submit(job(length));
    predictor.let_go(1 + count);
    calls = predictor.calls(1 + count);
  }
  return {calls.begin() + 1, calls.end()};
}

void test_texts_of_like_length_share_a_batch() {
  check(calls_for({10, 40, 12, 45}, 32, 0, 2) == Calls{{2, 12}, {2, 45}}, "without a cost of calls, two batches");
  check(calls_for({10, 40, 12, 45}, 2, 1000, 2) == Calls{{2, 12}, {2, 45}}, "a batch has at most max_batch texts");
}

void test_padding_may_cost_what_a_call_does() {
  check(calls_for({10, 40}, 32, 30, 1) == Calls{{2, 40}}, "padding of 30 for a call of 30");
  check(calls_for({10, 40}, 32, 29, 2) == Calls{{1, 10}, {1, 40}}, "padding of 30 for a call of 29");
  check(calls_for({10, 10, 40}, 32, 59, 2) == Calls{{2, 10}, {1, 40}}, "the padding is that of all texts");
}

void test_few_tokens_wait_for_the_call_that_runs() {
  const Model small = model();
  Predictor predictor;  // of both threads
  Batcher batcher({predictor.embed(), predictor.embed()}, small, 32, 100, 50);
  batcher.submit(job(20));
  check(predictor.calls(1) == Calls{{1, 20}}, "a lone text doesn't wait");
  batcher.submit(job(20));
  batcher.submit(job(20));
  batcher.submit(job(10));
  check(predictor.calls(2) == Calls{{1, 20}, {3, 20}}, "the second call starts when 50 tokens wait for it");
  predictor.let_go(2);
}

void test_the_cost_of_a_call() {
  const auto pause = [](int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); };
  const Model small = model();
  const Embed by_call = [&](const auto&, const auto&, int, int, float*) { pause(20); };
  check(call_cost_in_tokens(by_call, small) > 64, "texts that cost nothing");
  const Embed by_text = [&](const auto&, const auto&, int rows, int, float*) { pause(20 * rows); };
  check(call_cost_in_tokens(by_text, small) < 16, "calls that cost nothing");
}

}  // namespace

int main() {
  test_texts_of_like_length_share_a_batch();
  test_padding_may_cost_what_a_call_does();
  test_few_tokens_wait_for_the_call_that_runs();
  test_the_cost_of_a_call();
  return 0;
}
