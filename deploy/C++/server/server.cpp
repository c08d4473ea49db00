#include "server.h"

#include <sys/resource.h>

#include <algorithm>
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

constexpr seconds kMessageTimeout{30};  // for a request to come in, or a response to be taken
constexpr seconds kDrainTimeout{25};    // for all that goes on when the server is told to end: Kubernetes kills after 30
constexpr seconds kLateTimeout{2};      // for requests that are coming in then
constexpr seconds kDiscardTimeout{2};   // for more of a request that was refused
constexpr std::chrono::milliseconds kDrainCheckInterval{20};
constexpr size_t kMaxConnections = 1024;
constexpr size_t kOtherFiles = 32;  // that are open beside the connections; 11 with two predictors
constexpr size_t kFirstBytes = 512;
constexpr size_t kMaxHeaderBytes = 16 << 10;
constexpr size_t kMaxBufferBytes = 128 << 10;    // of HTTP that isn't parsed yet; ends endless lines between chunks
constexpr size_t kSmallBody = 64 << 10;          // there is always room for: 64 MiB in all connections
constexpr size_t kMaxDiscarded = 64 << 20;       // of a request that is refused unread
constexpr size_t kMaxBytesInFlight = 256 << 20;  // larger bodies of all connections
constexpr size_t kMaxFramesInFlight = 64;        // of one connection
constexpr size_t kMinCompressedBytes = 512;
constexpr char kPath[] = "/GeneralModelService/inference", kHealthPath[] = "/health";
constexpr char kHealthy[] = "{\"status\": \"ok\"}";  // as web_service.py answers

// The state that connections share.
struct Shared {
  const Model& model;
  Batcher& batcher;
  const size_t max_body_bytes;
  const seconds idle_timeout;  // between requests
  std::atomic<size_t> bytes_in_flight{0};
  std::atomic<bool> draining{false};
  std::atomic<bool> late{false};  // draining, and no request is waited for any more
};

// A part of the memory that bodies may take.
class Reservation {
 public:
  explicit Reservation(Shared& shared) : shared_(shared) {}
  ~Reservation() { shared_.bytes_in_flight.fetch_sub(bytes_); }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  // Takes so many bytes in all. Throws RequestError if too much is taken already.
  void grow(size_t bytes) {
    if (bytes <= std::max(bytes_, kSmallBody)) return;
    const size_t more = bytes - bytes_;
    if (shared_.bytes_in_flight.fetch_add(more) + more > kMaxBytesInFlight) {
      shared_.bytes_in_flight.fetch_sub(more);
      throw RequestError::overloaded("too many large requests are coming in; try again later");
    }
    bytes_ = bytes;
  }

 private:
  Shared& shared_;
  size_t bytes_ = 0;
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

std::string too_large_message(size_t max_bytes) {
  return "the body has more than " + std::to_string(max_bytes) + " bytes";
}

// A request's target without a query, a slash at its end and, as to a proxy, a scheme and a host.
std::string_view path_of(std::string_view target) {
  const size_t authority = target.find("://");
  if (!target.empty() && target[0] != '/' && authority != std::string_view::npos) {
    const size_t path = target.find_first_of("/?", authority + 3);
    target = path == std::string_view::npos ? std::string_view() : target.substr(path);
  }
  target = target.substr(0, target.find('?'));
  while (!target.empty() && target.back() == '/') target.remove_suffix(1);
  return target;
}

// Whether a Content-Type, with or without parameters, is one of these media types, which ignore case.
bool is_type(std::string_view content_type, std::initializer_list<const char*> types) {
  std::string_view type = content_type.substr(0, content_type.find(';'));
  while (!type.empty() && (type.back() == ' ' || type.back() == '\t')) type.remove_suffix(1);
  return std::any_of(types.begin(), types.end(),
                     [&](const char* known) { return beast::iequals({type.data(), type.size()}, known); });
}

// Whether an Accept-Encoding names gzip, and doesn't exclude it with q=0.
bool accepts_gzip(beast::string_view accepted) {
  for (const auto& [name, parameters] : http::ext_list(accepted)) {
    if (!beast::iequals(name, "gzip")) continue;
    for (const auto& [key, value] : parameters)
      if (beast::iequals(key, "q")) return std::strtod(std::string(value).c_str(), nullptr) > 0;
    return true;
  }
  return false;
}

class HttpConnection : public Connection {
 public:
  using Connection::Connection;

  void start() override {
    buffer_.max_size(kMaxBufferBytes);
    read_header();
  }

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
    parser_->body_limit(std::numeric_limits<uint64_t>::max());  // check_header and body_part_read limit it
    stream_.expires_after(idle() ? shared_.idle_timeout : kMessageTimeout);
    http::async_read_header(stream_, buffer_, *parser_,
                            [self = self()](error_code error, size_t) { self->header_read(error); });
  }

  static bool is_of_http(error_code error) {
    static const auto& http_errors = http::make_error_code(http::error::bad_method).category();
    return error.category() == http_errors && error != http::error::end_of_stream &&
           error != http::error::partial_message;
  }

  void header_read(error_code error) {
    if (error && !is_of_http(error)) return close();
    state_ = State::kReceiving;
    keep_alive_ = is_head_ = gzip_ = false;
    version_ = 11;
    format_ = Format::kJson;
    try {
      if (error == http::error::header_limit)
        throw RequestError(431, RpcError::kBadRequest, "the head of the request has more than 16 KiB");
      if (error) throw RequestError::bad("the request isn't HTTP 1.1: " + error.message());
      const auto& request = parser_->get();
      if (is_proto(request)) format_ = Format::kProto;
      gzip_ = accepts_gzip(request[http::field::accept_encoding]);
      is_head_ = request.method() == http::verb::head;
      version_ = request.version();
      check_path_and_method(request);
      if (is_health(request)) {
        keep_alive_ = request.keep_alive() && parser_->is_done();
        return respond(200, kHealthy);
      }
      check_header(request);
      keep_alive_ = request.keep_alive();
      reservation_.emplace(shared_);
      reservation_->grow(static_cast<size_t>(parser_->content_length().value_or(0)));
    } catch (const RequestError& refused) {
      keep_alive_ = false;
      return respond_error(refused);
    }
    stream_.expires_after(kMessageTimeout);
    parser_->eager(true);
    if (beast::iequals(parser_->get()[http::field::expect], "100-continue")) return write_continue();
    read_body();
  }

  using Request = http::request<http::string_body>;

  static std::string_view field(const Request& request, http::field name) {
    const auto value = request[name];
    return {value.data(), value.size()};
  }

  static bool is_json(const Request& request) {
    return is_type(field(request, http::field::content_type), {"application/json"});
  }

  static bool is_proto(const Request& request) {
    return is_type(field(request, http::field::content_type),
                   {"application/proto", "application/protobuf", "application/x-protobuf"});
  }

  static std::string_view path(const Request& request) {
    return path_of({request.target().data(), request.target().size()});
  }

  static bool is_health(const Request& request) { return path(request) == kHealthPath; }

  static void check_path_and_method(const Request& request) {
    const bool get = request.method() == http::verb::get || request.method() == http::verb::head;
    if (is_health(request)) {
      if (!get) throw RequestError(405, RpcError::kBadRequest, "the method has to be GET or HEAD");
    } else if (path(request) != kPath) {
      throw RequestError(404, RpcError::kNoMethod, std::string("the server has the path ") + kPath);
    } else if (request.method() != http::verb::post) {
      throw RequestError(405, RpcError::kBadRequest, "the method has to be POST");
    }
  }

  void check_header(const Request& request) const {
    if (!is_json(request) && !is_proto(request))
      throw RequestError(415, RpcError::kBadRequest, "Content-Type has to be application/proto or application/json");
    const auto encoding = request[http::field::content_encoding];
    if (!encoding.empty() && !beast::iequals(encoding, "identity") && !is_gzip(request))
      throw RequestError(415, RpcError::kBadRequest, "Content-Encoding has to be gzip, or nothing");
    const auto transfer = request[http::field::transfer_encoding];
    if (!transfer.empty() && !beast::iequals(transfer, "chunked"))
      throw RequestError(501, RpcError::kBadRequest, "Transfer-Encoding has to be chunked, or nothing");
    const auto length = parser_->content_length();
    if (!length && !parser_->chunked())
      throw RequestError(411, RpcError::kBadRequest, "Content-Length is missing: send it, or chunks");
    if (length && *length > shared_.max_body_bytes)
      throw RequestError::too_large(too_large_message(shared_.max_body_bytes));
  }

  static bool is_gzip(const Request& request) {
    const auto encoding = request[http::field::content_encoding];
    return beast::iequals(encoding, "gzip") || beast::iequals(encoding, "x-gzip");
  }

  void write_continue() {
    auto response = std::make_shared<http::response<http::empty_body>>(http::status::continue_, 11);
    http::async_write(stream_, *response, [self = self(), response](error_code error, size_t) {
      if (error) return self->close();
      self->read_body();
    });
  }

  void read_body() {
    if (parser_->is_done()) return body_read();
    http::async_read_some(stream_, buffer_, *parser_,
                          [self = self()](error_code error, size_t) { self->body_part_read(error); });
  }

  // Chunks don't say how large the body is going to be.
  void body_part_read(error_code error) {
    if (error && !is_of_http(error)) return close();
    try {
      if (error) throw RequestError::bad("the body's chunks are damaged: " + error.message());
      const std::string& body = parser_->get().body();
      if (body.size() > shared_.max_body_bytes)
        throw RequestError::too_large(too_large_message(shared_.max_body_bytes));
      reservation_->grow(body.capacity());
    } catch (const RequestError& refused) {
      keep_alive_ = false;
      return respond_error(refused);
    }
    read_body();
  }

  void body_read() {
    state_ = State::kAnswering;
    stream_.expires_never();
    try {
      const auto& request = parser_->get();
      std::string decompressed;
      std::string_view body = request.body();
      if (is_gzip(request)) body = decompressed = decompress(body, shared_.max_body_bytes);
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
    if (status == 405) response_.set(http::field::allow, is_health(parser_->get()) ? "GET, HEAD" : "POST");
    response_.body() = std::move(body);
    response_.prepare_payload();
    if (is_head_) response_.body().clear();  // Content-Length stays
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
  bool keep_alive_ = false, gzip_ = false, is_head_ = false;
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
    stream_.expires_after(buffer_.size() > 0 ? kMessageTimeout : shared_.idle_timeout);
    fill(kFrameHeaderBytes, [this] { header_read(); });
  }

  void header_read() {
    try {
      sizes_ = parse_frame_header(buffered().substr(0, kFrameHeaderBytes), shared_.max_body_bytes);
      buffer_.consume(kFrameHeaderBytes);
      reservation_.emplace(shared_);
      reservation_->grow(sizes_.body);
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
      : context_(context),
        strand_(asio::make_strand(context)),
        acceptor_(strand_),
        retry_(strand_),
        shared_(shared),
        max_connections_(connection_limit()) {
    try {
      const tcp::endpoint endpoint = resolve(options);
      acceptor_.open(endpoint.protocol());
      acceptor_.set_option(asio::socket_base::reuse_address(true));
      acceptor_.bind(endpoint);
      acceptor_.listen();
    } catch (const boost::system::system_error& error) {
      const std::string reason = "can't listen on " + options.host + " (" + error.code().message() + "); ";
      if (error.code().category() == asio::error::get_netdb_category() ||
          error.code() == boost::system::errc::address_family_not_supported ||
          error.code() == boost::system::errc::address_not_available)
        throw InputError("SERVING_HOST " + options.host + ": " + reason + "give an address of this machine");
      throw InputError("--port " + std::to_string(options.port) + ": " + reason + "name another");
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
      if (open_ < max_connections_) find_out_protocol(std::move(socket));
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
  // Of a name's addresses an IPv4 address, as web_service.py and clients of "localhost" do, else the first.
  tcp::endpoint resolve(const ServerOptions& options) {
    const auto found =
        tcp::resolver(context_).resolve(options.host, std::to_string(options.port), tcp::resolver::passive);
    const auto v4 =
        std::find_if(found.begin(), found.end(), [](const auto& entry) { return entry.endpoint().address().is_v4(); });
    return v4 == found.end() ? found.begin()->endpoint() : v4->endpoint();
  }

  // Raises the limit on open files, within what the system allows. Says so where it doesn't allow kMaxConnections.
  static size_t connection_limit() {
    rlimit files{};
    if (getrlimit(RLIMIT_NOFILE, &files) != 0) return kMaxConnections;
    constexpr rlim_t needed = kMaxConnections + kOtherFiles;
    if (files.rlim_cur < needed) {
      files.rlim_cur = std::min(files.rlim_max, needed);
      setrlimit(RLIMIT_NOFILE, &files);
    }
    if (files.rlim_cur >= needed) return kMaxConnections;
    const size_t room = files.rlim_cur > kOtherFiles ? files.rlim_cur - kOtherFiles : 1;
    std::cerr << "note: ulimit -n leaves room for " << room << " connections; ulimit -n " << needed << " is enough"
              << std::endl;
    return room;
  }

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
    opening->stream.expires_after(shared_.idle_timeout);
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
  const size_t max_connections_;
  std::atomic<size_t> open_{0};
  std::mutex mutex_;
  std::unordered_map<Connection*, std::weak_ptr<Connection>> connections_;
  std::unordered_set<std::shared_ptr<Opening>> openings_;
};

}  // namespace

void serve(const ServerOptions& options, const Model& model, Batcher& batcher,
           const std::function<void(unsigned short)>& ready) {
  Shared shared{model, batcher, options.max_body_bytes, options.idle_timeout};
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
