#include "batcher.h"

#include <algorithm>
#include <chrono>

namespace {

// Whether texts of these lengths may share a batch however many they are.
bool similar(size_t shortest, size_t longest) { return longest <= shortest + 8 || longest * 4 <= shortest * 5; }

}  // namespace

size_t call_cost_in_tokens(const Embed& embed, const Model& model) {
  using Seconds = std::chrono::duration<double>;
  constexpr int kRows = 8, kMinRuns = 3;
  constexpr Seconds kMinTime(0.1);  // small models need more runs to stand out from the noise
  constexpr double kMaxTexts = 32;  // where the texts cost next to nothing, as on a GPU
  const int length = static_cast<int>(std::min<int64_t>(16, model.max_length));
  const auto shortest_run = [&](int rows) {
    const std::vector<int64_t> input_ids(rows * length, model.pad_id ? 0 : 1), token_type_ids(rows * length, 0);
    std::vector<float> vectors(rows * static_cast<size_t>(model.dimension));
    Seconds shortest = Seconds::max(), total(0);
    for (int run = 0; run < kMinRuns || total < kMinTime; ++run) {
      const auto start = std::chrono::steady_clock::now();
      embed(input_ids, token_type_ids, rows, length, vectors.data());
      const Seconds time = std::chrono::steady_clock::now() - start;
      shortest = std::min(shortest, time);
      total += time;
    }
    return shortest.count();
  };
  const double one = shortest_run(1);
  const double text = (shortest_run(kRows) - one) / (kRows - 1);
  const double texts = one >= (1 + kMaxTexts) * text ? kMaxTexts : std::max(0.0, one / text - 1);
  return static_cast<size_t>(texts * length);
}

Batcher::Batcher(std::vector<Embed> predictors, const Model& model, size_t max_batch, size_t max_waiting,
                 size_t call_cost)
    : model_(model), max_batch_(max_batch), max_waiting_(max_waiting), call_cost_(call_cost) {
  for (Embed& embed : predictors) threads_.emplace_back([this, embed = std::move(embed)] { work(embed); });
}

Batcher::~Batcher() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Batcher::submit(std::shared_ptr<Job> job) {
  const size_t count = job->texts.rows.size();
  job->missing = count;
  job->vectors.resize(count * static_cast<size_t>(model_.dimension));
  {
    const std::lock_guard lock(mutex_);
    if (by_length_.size() + count > max_waiting_)
      throw RequestError::overloaded("too many texts are waiting; try again later");
    for (size_t row = 0; row < count; ++row) {
      auto text = std::make_shared<Text>(Text{job, row});
      by_age_.push_back(text);
      by_length_.emplace(text->length(), text);
      waiting_tokens_ += text->length();
    }
  }
  changed_.notify_all();
}

void Batcher::work(const Embed& embed) {
  while (true) {
    const auto batch = next_batch();
    if (batch.empty()) return;
    run(embed, batch);
  }
}

bool Batcher::batch_is_due() const {
  return !by_length_.empty() && (stopping_ || running_ == 0 || waiting_tokens_ >= call_cost_);
}

// The text that waits longest and those closest to it in length; none once the batcher stops and nothing waits.
std::vector<Batcher::TextPointer> Batcher::next_batch() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return stopping_ || batch_is_due(); });
  if (by_length_.empty()) return {};
  while (by_age_.front()->taken) by_age_.pop_front();
  const TextPointer oldest = by_age_.front();
  const auto [first, last] = by_length_.equal_range(oldest->length());
  auto begin = std::find_if(first, last, [&](const auto& entry) { return entry.second == oldest; });
  auto end = std::next(begin);
  size_t shortest = oldest->length(), longest = shortest, tokens = shortest;
  for (size_t count = 1; count < max_batch_; ++count) {
    const auto may_join = [&](size_t length) {
      const size_t padding = (count + 1) * std::max(longest, length) - (tokens + length);
      return padding <= call_cost_ || similar(std::min(shortest, length), std::max(longest, length));
    };
    const bool shorter = begin != by_length_.begin() && may_join(std::prev(begin)->first);
    const bool longer = end != by_length_.end() && may_join(end->first);
    if (!shorter && !longer) break;
    if (!longer || (shorter && longest - std::prev(begin)->first <= end->first - shortest))
      tokens += shortest = (--begin)->first;
    else
      tokens += longest = (end++)->first;
  }
  std::vector<TextPointer> batch;
  for (auto entry = begin; entry != end; ++entry) {
    entry->second->taken = true;
    batch.push_back(entry->second);
  }
  by_length_.erase(begin, end);
  waiting_tokens_ -= tokens;
  ++running_;
  while (!by_age_.empty() && by_age_.front()->taken) by_age_.pop_front();
  return batch;
}

void Batcher::run(const Embed& embed, const std::vector<TextPointer>& batch) {
  const size_t length = batch.back()->length();  // they are sorted
  const auto dimension = static_cast<size_t>(model_.dimension);
  std::vector<int64_t> input_ids(batch.size() * length, model_.pad_id), token_type_ids(batch.size() * length, 0);
  std::vector<float> vectors(batch.size() * dimension);
  for (size_t row = 0; row < batch.size(); ++row) {
    const Texts& texts = batch[row]->job->texts;
    const auto [start, count] = texts.rows[batch[row]->row];
    std::copy_n(texts.input_ids.begin() + start, count, input_ids.begin() + row * length);
    std::copy_n(texts.token_type_ids.begin() + start, count, token_type_ids.begin() + row * length);
  }
  std::optional<RequestError> error;
  try {
    embed(input_ids, token_type_ids, static_cast<int>(batch.size()), static_cast<int>(length), vectors.data());
  } catch (const RequestError& caught) {
    error = caught;
  }
  std::vector<std::shared_ptr<Job>> finished;
  {
    const std::lock_guard lock(mutex_);
    --running_;
    for (size_t row = 0; row < batch.size(); ++row) {
      Job& job = *batch[row]->job;
      if (error) job.error = error;
      std::copy_n(vectors.begin() + row * dimension, dimension, job.vectors.begin() + batch[row]->row * dimension);
      if (--job.missing == 0) finished.push_back(batch[row]->job);
    }
  }
  for (const auto& job : finished) job->done();
}
