#include "server.h"

#include <atomic>
#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <csignal>
#include <cstdlib>
#include <deque>
#include <iostream>
#include <limits>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>
#include <unordered_set>

#include "frame.h"
#include "message.h"

namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using boost::system::error_code;
using tcp = asio::ip::tcp;
using std::chrono::seconds;

constexpr seconds kIdleTimeout{300};    // between requests
constexpr seconds kMessageTimeout{30};  // for a request to come in, or a response to be taken
constexpr seconds kDrainTimeout{25};    // for all that goes on when the server is told to end: Kubernetes kills after 30
constexpr seconds kLateTimeout{2};      // for requests that are coming in then
constexpr seconds kDiscardTimeout{2};   // for more of a request that was refused
constexpr std::chrono::milliseconds kDrainCheckInterval{20};
constexpr size_t kMaxConnections = 1024;
constexpr size_t kFirstBytes = 512;
constexpr size_t kMaxHeaderBytes = 16 << 10;
constexpr size_t kSmallBody = 64 << 10;          // there is always room for: 64 MiB in all connections
constexpr size_t kMaxDiscarded = 64 << 20;       // of a request that is refused unread
constexpr size_t kMaxBytesInFlight = 256 << 20;  // larger bodies of all connections
constexpr size_t kMaxFramesInFlight = 64;        // of one connection
constexpr size_t kMinCompressedBytes = 512;
constexpr char kPath[] = "/GeneralModelService/inference";

// The state that connections share.
struct Shared {
  const Model& model;
  Batcher& batcher;
  const size_t max_body_bytes;
  std::atomic<size_t> bytes_in_flight{0};
  std::atomic<bool> draining{false};
  std::atomic<bool> late{false};  // draining, and no request is waited for any more
};

// A part of the memory that bodies may take.
class Reservation {
 public:
  // Throws RequestError if too much is taken already.
  Reservation(Shared& shared, size_t bytes) : shared_(shared), bytes_(bytes > kSmallBody ? bytes : 0) {
    if (shared.bytes_in_flight.fetch_add(bytes_) + bytes_ > kMaxBytesInFlight) {
      shared.bytes_in_flight.fetch_sub(bytes_);
      throw RequestError::overloaded("too many large requests are coming in; try again later");
    }
  }
  ~Reservation() { shared_.bytes_in_flight.fetch_sub(bytes_); }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

 private:
  Shared& shared_;
  const size_t bytes_;
};

// A connection of either protocol. All its handlers run on the strand of its stream.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(beast::tcp_stream stream, beast::flat_buffer buffer, Shared& shared)
      : stream_(std::move(stream)), buffer_(std::move(buffer)), shared_(shared) {}
  virtual ~Connection() = default;
  virtual void start() = 0;

  // Ends the connection if it has nothing to answer.
  void drain() {
    asio::post(stream_.get_executor(), [self = shared_from_this()] {
      if (self->idle() || (self->shared_.late && self->receiving())) self->close();
    });
  }

 protected:
  // Whether no part of a request is here.
  virtual bool idle() const = 0;
  // Whether there is nothing to answer but a request that is coming in, if any.
  virtual bool receiving() const = 0;

  void close() {
    error_code ignored;
    stream_.socket().shutdown(tcp::socket::shutdown_both, ignored);
    stream_.socket().close(ignored);
  }

  // Ends the connection after a response. A request that wasn't read to its end would make the kernel reset the
  // connection, and the client, which sends all of it before it reads, would lose the response: it is read first.
  void finish() {
    error_code ignored;
    stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
    discard(kMaxDiscarded);
  }

  void discard(size_t most) {
    if (shared_.draining) return close();
    buffer_.clear();
    stream_.expires_after(kDiscardTimeout);
    stream_.async_read_some(buffer_.prepare(64 << 10), [self = shared_from_this(), most](error_code error, size_t size) {
      if (error || size > most) return self->close();
      self->discard(most - size);
    });
  }

  // Calls `answer(job)` on the strand when the job has its vectors or an error. Throws RequestError.
  template <typename Answer>
  void submit(Texts texts, Answer answer) {
    auto job = std::make_shared<Job>();
    job->texts = std::move(texts);
    // The job holds `done`, which mustn't hold the job in turn.
    job->done = [self = shared_from_this(), weak = std::weak_ptr<Job>(job), answer = std::move(answer)] {
      asio::post(self->stream_.get_executor(), [self, job = weak.lock(), answer] { answer(*job); });
    };
    shared_.batcher.submit(std::move(job));
  }

  beast::tcp_stream stream_;
  beast::flat_buffer buffer_;
  Shared& shared_;
};

// ---------------------------------------------------------------------------------------------------------------------
// HTTP: one request after the other

class HttpConnection : public Connection {
 public:
  using Connection::Connection;

  void start() override { read_header(); }

 private:
  using Parser = http::request_parser<http::string_body>;
  enum class State { kWaiting, kReceiving, kAnswering };

  bool idle() const override { return state_ == State::kWaiting; }
  bool receiving() const override { return state_ != State::kAnswering; }

  std::shared_ptr<HttpConnection> self() { return std::static_pointer_cast<HttpConnection>(shared_from_this()); }

  void read_header() {
    state_ = buffer_.size() > 0 ? State::kReceiving : State::kWaiting;
    if (shared_.draining && idle()) return close();
    reservation_.reset();
    parser_.emplace();
    parser_->header_limit(kMaxHeaderBytes);
    parser_->body_limit(std::numeric_limits<uint64_t>::max());  // check_header looks at Content-Length
    stream_.expires_after(idle() ? kIdleTimeout : kMessageTimeout);
    http::async_read_header(stream_, buffer_, *parser_,
                            [self = self()](error_code error, size_t) { self->header_read(error); });
  }

  void header_read(error_code error) {
    static const auto& http_errors = http::make_error_code(http::error::bad_method).category();
    if (error == http::error::end_of_stream || (error && error.category() != http_errors)) return close();
    state_ = State::kReceiving;
    keep_alive_ = false;
    version_ = 11;
    try {
      if (error) throw RequestError::bad("the request isn't HTTP: " + error.message());
      const auto& request = parser_->get();
      format_ = is_json(request) ? Format::kJson : Format::kProto;
      gzip_ = request[http::field::accept_encoding].find("gzip") != beast::string_view::npos;
      check_header(request);
      keep_alive_ = request.keep_alive();
      version_ = request.version();
      reservation_.emplace(shared_, *parser_->content_length());
    } catch (const RequestError& refused) {
      return respond_error(refused);
    }
    stream_.expires_after(kMessageTimeout);
    if (beast::iequals(parser_->get()[http::field::expect], "100-continue")) return write_continue();
    read_body();
  }

  static bool is_json(const http::request<http::string_body>& request) {
    return request[http::field::content_type].starts_with("application/json");
  }

  void check_header(const http::request<http::string_body>& request) const {
    if (request.target() != kPath)
      throw RequestError(404, RpcError::kNoMethod, std::string("the server has one path, ") + kPath);
    if (request.method() != http::verb::post)
      throw RequestError(405, RpcError::kBadRequest, "the method has to be POST");
    const auto type = request[http::field::content_type];
    if (!is_json(request) && !type.starts_with("application/proto") && !type.starts_with("application/x-protobuf"))
      throw RequestError(415, RpcError::kBadRequest, "Content-Type has to be application/proto or application/json");
    const auto encoding = request[http::field::content_encoding];
    if (!encoding.empty() && !beast::iequals(encoding, "gzip") && !beast::iequals(encoding, "identity"))
      throw RequestError(415, RpcError::kBadRequest, "Content-Encoding has to be gzip, or nothing");
    const auto length = parser_->content_length();
    if (!length) throw RequestError(411, RpcError::kBadRequest, "Content-Length is missing");
    if (*length > shared_.max_body_bytes)
      throw RequestError::too_large("the body has more than " + std::to_string(shared_.max_body_bytes) + " bytes");
  }

  void write_continue() {
    auto response = std::make_shared<http::response<http::empty_body>>(http::status::continue_, 11);
    http::async_write(stream_, *response, [self = self(), response](error_code error, size_t) {
      if (error) return self->close();
      self->read_body();
    });
  }

  void read_body() {
    http::async_read(stream_, buffer_, *parser_, [self = self()](error_code error, size_t) { self->body_read(error); });
  }

  void body_read(error_code error) {
    if (error) return close();
    state_ = State::kAnswering;
    stream_.expires_never();
    try {
      const auto& request = parser_->get();
      std::string decompressed;
      std::string_view body = request.body();
      if (beast::iequals(request[http::field::content_encoding], "gzip"))
        body = decompressed = decompress(body, shared_.max_body_bytes);
      submit(parse_request(body, format_, shared_.model), [self = self()](const Job& job) { self->answer(job); });
    } catch (const RequestError& refused) {
      respond_error(refused);
    } catch (const std::exception& error) {  // such as a lack of memory
      respond_error(RequestError::internal(error.what()));
    }
  }

  void answer(const Job& job) {
    if (job.error) return respond_error(*job.error);
    respond(200, format_response(job.vectors, job.texts, format_, shared_.model));
  }

  void respond_error(const RequestError& error) { respond(error.http_status, format_error(error, format_)); }

  void respond(int status, std::string body) {
    state_ = State::kAnswering;
    response_ = {};
    response_.result(static_cast<unsigned>(status));
    response_.version(version_);  // for HTTP/1.0 keep_alive sets the header that it needs
    response_.keep_alive(keep_alive_ && !shared_.draining);
    // Paddle Serving's client compares this text.
    response_.set(http::field::content_type, format_ == Format::kJson ? "application/json" : "application/proto");
    if (gzip_ && body.size() > kMinCompressedBytes) {
      body = compress_gzip(body);
      response_.set(http::field::content_encoding, "gzip");
    }
    response_.body() = std::move(body);
    response_.prepare_payload();
    stream_.expires_after(kMessageTimeout);
    http::async_write(stream_, response_, [self = self()](error_code error, size_t) {
      if (error) return self->close();
      if (!self->response_.keep_alive()) return self->finish();
      self->read_header();
    });
  }

  std::optional<Parser> parser_;
  http::response<http::string_body> response_;
  std::optional<Reservation> reservation_;
  Format format_ = Format::kProto;
  State state_ = State::kWaiting;
  bool keep_alive_ = false, gzip_ = false;
  unsigned version_ = 11;
};

// ---------------------------------------------------------------------------------------------------------------------
// baidu_std: several requests at a time, answered in the order in which they are done

class FrameConnection : public Connection {
 public:
  using Connection::Connection;

  void start() override { read_frame(); }

 private:
  bool idle() const override { return in_flight_ == 0 && buffer_.size() < kFrameHeaderBytes && !reading_body_; }
  bool receiving() const override { return in_flight_ == 0; }

  std::shared_ptr<FrameConnection> self() { return std::static_pointer_cast<FrameConnection>(shared_from_this()); }

  // Reads until the buffer holds `size` bytes.
  template <typename Then>
  void fill(size_t size, Then then) {
    const size_t missing = size > buffer_.size() ? size - buffer_.size() : 0;
    asio::async_read(stream_, buffer_.prepare(missing), [self = self(), then](error_code error, size_t count) {
      self->buffer_.commit(count);
      if (error) return self->read_failed();
      then();
    });
  }

  std::string_view buffered() const { return {static_cast<const char*>(buffer_.data().data()), buffer_.size()}; }

  void read_frame() {
    reading_ = true;
    stream_.expires_after(buffer_.size() > 0 ? kMessageTimeout : kIdleTimeout);
    fill(kFrameHeaderBytes, [this] { header_read(); });
  }

  void header_read() {
    try {
      sizes_ = parse_frame_header(buffered().substr(0, kFrameHeaderBytes), shared_.max_body_bytes);
      buffer_.consume(kFrameHeaderBytes);
      reservation_.emplace(shared_, sizes_.body);
    } catch (const RequestError& error) {
      return refuse_and_end(error);  // where the next frame starts isn't known
    }
    reading_body_ = true;
    stream_.expires_after(kMessageTimeout);
    fill(sizes_.body, [this] { body_read(); });
  }

  void body_read() {
    reading_ = reading_body_ = false;
    ++in_flight_;
    Frame frame;
    try {
      if (shared_.draining) throw RequestError::shutting_down();
      parse_frame(buffered().substr(0, sizes_.body), sizes_.meta, shared_.max_body_bytes, frame);
      submit(parse_request(frame.body, Format::kProto, shared_.model),
             [self = self(), id = frame.correlation_id](const Job& job) { self->answer(id, job); });
    } catch (const RequestError& error) {
      write(format_frame_error(frame.correlation_id, error));
    } catch (const std::exception& error) {  // such as a lack of memory
      write(format_frame_error(frame.correlation_id, RequestError::internal(error.what())));
    }
    buffer_.consume(sizes_.body);
    if (buffer_.size() == 0) buffer_.shrink_to_fit();
    reservation_.reset();
    read_next();
  }

  void read_next() {
    const bool wanted = !ending_ && in_flight_ < kMaxFramesInFlight && !(shared_.draining && buffer_.size() == 0);
    if (wanted && !reading_ && stream_.socket().is_open()) read_frame();
  }

  // The client has closed its side, sends nothing or too slowly. It may still wait for answers.
  void read_failed() {
    reading_ = reading_body_ = false;
    reservation_.reset();
    ending_ = true;
    if (in_flight_ == 0) close();
  }

  void refuse_and_end(const RequestError& error) {
    reading_ = false;
    ending_ = refused_ = true;
    ++in_flight_;
    write(format_frame_error(0, error));
  }

  void answer(int64_t correlation_id, const Job& job) {
    write(job.error
              ? format_frame_error(correlation_id, *job.error)
              : format_frame(correlation_id, format_response(job.vectors, job.texts, Format::kProto, shared_.model)));
  }

  void write(std::string bytes) {
    output_.push_back(std::move(bytes));
    if (output_.size() == 1) write_next();
  }

  void write_next() {
    stream_.expires_after(kMessageTimeout);
    asio::async_write(stream_, asio::buffer(output_.front()),
                      [self = self()](error_code error, size_t) { self->written(error); });
  }

  void written(error_code error) {
    if (error) {
      ending_ = true;
      return close();
    }
    output_.pop_front();
    --in_flight_;
    if (!output_.empty()) write_next();
    if (in_flight_ == 0 && refused_) return finish();
    if (in_flight_ == 0 && (ending_ || shared_.late || (shared_.draining && idle()))) return close();
    read_next();
  }

  FrameSizes sizes_{};
  std::optional<Reservation> reservation_;
  std::deque<std::string> output_;
  size_t in_flight_ = 0;  // frames read and not answered
  bool reading_ = false, reading_body_ = false, ending_ = false;
  bool refused_ = false;  // a frame, the rest of which may still come
};

// ---------------------------------------------------------------------------------------------------------------------
// The port

class Listener {
 public:
  Listener(asio::io_context& context, const ServerOptions& options, Shared& shared)
      : context_(context), strand_(asio::make_strand(context)), acceptor_(strand_), retry_(strand_), shared_(shared) {
    try {
      const tcp::endpoint endpoint =
          *tcp::resolver(context).resolve(options.host, std::to_string(options.port), tcp::resolver::passive).begin();
      acceptor_.open(endpoint.protocol());
      acceptor_.set_option(asio::socket_base::reuse_address(true));
      acceptor_.bind(endpoint);
      acceptor_.listen();
    } catch (const boost::system::system_error& error) {
      throw InputError("--port " + std::to_string(options.port) + ": can't listen on " + options.host + " (" +
                       error.code().message() + ")");
    }
  }

  unsigned short port() const { return acceptor_.local_endpoint().port(); }

  // Connections that there are; with none, nothing refers to what they share.
  size_t open() const { return open_; }

  void accept() {
    acceptor_.async_accept(asio::make_strand(context_), [this](error_code error, tcp::socket socket) {
      if (!acceptor_.is_open()) return;
      if (error) {  // such as too many open files
        retry_.expires_after(std::chrono::milliseconds(100));
        return retry_.async_wait([this](error_code stopped) {
          if (!stopped && acceptor_.is_open()) accept();
        });
      }
      if (open_ < kMaxConnections) find_out_protocol(std::move(socket));
      accept();
    });
  }

  void drain() {
    asio::post(strand_, [this] {
      error_code ignored;
      acceptor_.close(ignored);
      retry_.cancel();
      std::vector<std::shared_ptr<Connection>> connections;  // to be let go of without the lock, which their end takes
      {
        const std::lock_guard lock(mutex_);
        for (const auto& [_, weak] : connections_) connections.push_back(weak.lock());
        for (const auto& opening : openings_)
          asio::post(opening->stream.get_executor(), [opening] { opening->stream.close(); });
      }
      for (const auto& connection : connections)
        if (connection) connection->drain();
    });
  }

 private:
  // A connection whose first bytes haven't come yet.
  struct Opening {
    explicit Opening(tcp::socket socket) : stream(std::move(socket)) {}
    beast::tcp_stream stream;
    beast::flat_buffer buffer;
  };

  void find_out_protocol(tcp::socket socket) {
    error_code ignored;
    socket.set_option(tcp::no_delay(true), ignored);
    auto opening = std::shared_ptr<Opening>(new Opening(std::move(socket)), [this](Opening* gone) {
      delete gone;
      --open_;
    });
    ++open_;
    {
      const std::lock_guard lock(mutex_);
      openings_.insert(opening);
    }
    opening->stream.expires_after(kIdleTimeout);
    read_first(opening);
  }

  void read_first(const std::shared_ptr<Opening>& opening) {
    opening->stream.async_read_some(opening->buffer.prepare(kFirstBytes),
                                    [this, opening](error_code error, size_t count) {
                                      opening->buffer.commit(count);
                                      if (!error && opening->buffer.size() < kFrameMagic.size())
                                        return read_first(opening);
                                      opened(opening, error);
                                    });
  }

  void opened(const std::shared_ptr<Opening>& opening, error_code error) {
    const std::lock_guard lock(mutex_);
    openings_.erase(opening);
    if (error || shared_.draining) return;
    const std::string_view first(static_cast<const char*>(opening->buffer.data().data()), kFrameMagic.size());
    if (first == kFrameMagic)
      connect<FrameConnection>(*opening);
    else
      connect<HttpConnection>(*opening);
  }

  template <typename Kind>
  void connect(Opening& opening) {
    auto connection = std::shared_ptr<Connection>(
        new Kind(std::move(opening.stream), std::move(opening.buffer), shared_), [this](Connection* gone) {
          {
            const std::lock_guard lock(mutex_);
            connections_.erase(gone);
          }
          delete gone;
          --open_;
        });
    ++open_;
    connections_[connection.get()] = connection;
    connection->start();
  }

  asio::io_context& context_;
  asio::strand<asio::io_context::executor_type> strand_;
  tcp::acceptor acceptor_;
  asio::steady_timer retry_;
  Shared& shared_;
  std::atomic<size_t> open_{0};
  std::mutex mutex_;
  std::unordered_map<Connection*, std::weak_ptr<Connection>> connections_;
  std::unordered_set<std::shared_ptr<Opening>> openings_;
};

}  // namespace

void serve(const ServerOptions& options, const Model& model, Batcher& batcher,
           const std::function<void(unsigned short)>& ready) {
  Shared shared{model, batcher, options.max_body_bytes};
  asio::io_context context(options.network_threads);
  Listener listener(context, options, shared);
  listener.accept();

  // Never destroyed: that would bring the default back, and a second signal would end the process at once.
  static auto& signals = *new asio::signal_set(context, SIGTERM, SIGINT);
  asio::steady_timer check(context);
  std::chrono::steady_clock::time_point told;
  const std::function<void()> wait_for_connections = [&] {
    if (listener.open() == 0) return;
    const auto elapsed = std::chrono::steady_clock::now() - told;
    if (elapsed > kLateTimeout && !shared.late.exchange(true)) listener.drain();
    if (elapsed > kDrainTimeout) {
      std::cerr << "stopped with requests unanswered after " << kDrainTimeout.count() << " s" << std::endl;
      std::_Exit(1);  // threads still use what a return would destroy
    }
    check.expires_after(kDrainCheckInterval);
    check.async_wait([&](error_code) { wait_for_connections(); });
  };
  signals.async_wait([&](error_code, int) {
    shared.draining = true;
    told = std::chrono::steady_clock::now();
    listener.drain();
    wait_for_connections();
  });
  ready(listener.port());
  std::vector<std::thread> threads;
  for (int i = 1; i < options.network_threads; ++i) threads.emplace_back([&] { context.run(); });
  context.run();
  for (std::thread& thread : threads) thread.join();
}
