#include "options.h"

#include <unistd.h>

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <optional>
#include <string_view>
#include <utility>

#include "error.h"
#include "model_config.pb.h"
#include "predictor.h"

namespace {

constexpr char kServerConfig[] = "serving_server_conf.prototxt";
constexpr std::string_view kGraphSuffix = ".json", kWeightsSuffix = ".pdiparams";

// This program's own, and those that paddle_serving_server.serve passes on.
constexpr std::string_view kKnownFlags[] = {
    "host", "idle_timeout_s", "max_queued_texts", "max_waiting_texts",
    // paddle_serving_server 0.9.0, server.py
    "bthread_concurrency", "enable_model_toolkit", "enable_prometheus", "inferservice_file", "inferservice_path",
    "max_body_size", "max_concurrency", "num_threads", "port", "precision", "prometheus_port", "reload_interval_s",
    "request_cache_size", "resource_file", "resource_path", "use_calib", "use_trt", "workflow_file", "workflow_path"};
constexpr int64_t kMaxIdleTimeout = 86400;
constexpr char kVariablePrefix[] = "SERVING_";  // of a variable in the environment, as web_service.py has it
constexpr std::string_view kVariables[] = {"SERVING_BIN",  // Paddle Serving's
                                           "SERVING_HOST", "SERVING_IDLE_TIMEOUT_S", "SERVING_MAX_QUEUED_TEXTS"};

using Flags = std::map<std::string, std::string>;

bool is_value(const char* argument) {
  return argument[0] != '-' || std::isdigit(static_cast<unsigned char>(argument[1]));
}

// gflags' ways to write them: -name value, -name=value, with one dash or two, and -name alone for a switch. Of several
// values, as argparse allows them, the first counts.
Flags read_flags(int argc, char** argv) {
  Flags flags;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const size_t dashes = argument.find_first_not_of('-');
    if (dashes == 0 || dashes > 2) throw InputError(std::string(argument) + ": isn't an option");
    const size_t equals = argument.find('=');
    const std::string name(argument.substr(dashes, equals - dashes));
    if (equals != std::string_view::npos)
      flags[name] = argument.substr(equals + 1);
    else if (i + 1 < argc && is_value(argv[i + 1]))
      flags[name] = argv[++i];
    else
      flags[name] = "true";
    while (i + 1 < argc && is_value(argv[i + 1])) ++i;
  }
  return flags;
}

std::string text(const Flags& flags, const std::string& name, const std::string& otherwise) {
  const auto found = flags.find(name);
  return found == flags.end() ? otherwise : found->second;
}

int64_t parse_number(const std::string& source, const std::string& given, int64_t minimum, int64_t maximum) {
  int64_t value = 0;
  const char* const end = given.data() + given.size();
  const auto [stopped, error] = std::from_chars(given.data(), end, value);
  if (error != std::errc() || stopped != end || value < minimum || value > maximum)
    throw InputError(source + " " + given + ": give a number from " + std::to_string(minimum) + " to " +
                     std::to_string(maximum));
  return value;
}

int64_t number(const Flags& flags, const std::string& name, int64_t otherwise, int64_t minimum, int64_t maximum) {
  const auto found = flags.find(name);
  return found == flags.end() ? otherwise : parse_number("-" + name, found->second, minimum, maximum);
}

// The number in a flag, else in the environment: Paddle Serving has no option for it.
int64_t number_or_variable(const Flags& flags, const std::string& name, int64_t otherwise, int64_t minimum,
                           int64_t maximum) {
  std::string variable = kVariablePrefix + name;
  std::transform(variable.begin(), variable.end(), variable.begin(), [](unsigned char c) { return std::toupper(c); });
  const char* const given = std::getenv(variable.c_str());
  if (given && *given) otherwise = parse_number(variable, given, minimum, maximum);
  return number(flags, name, otherwise, minimum, maximum);
}

// Says which variables with our prefix have no effect, such as misspelled ones and those of web_service.py.
void report_other_variables() {
  std::string others;
  for (char** variable = environ; *variable; ++variable) {
    const std::string_view line(*variable), name = line.substr(0, line.find('='));
    if (name.rfind(kVariablePrefix, 0) == 0 &&
        std::find(std::begin(kVariables), std::end(kVariables), name) == std::end(kVariables))
      others.append(others.empty() ? "" : ", ").append(name);
  }
  if (!others.empty()) std::cerr << "note: " << others << ": no setting of this server, ignored" << std::endl;
}

void check_names(const Flags& flags) {
  for (const auto& [name, _] : flags)
    if (std::find(std::begin(kKnownFlags), std::end(kKnownFlags), name) == std::end(kKnownFlags))
      throw InputError("-" + name + ": isn't an option of this server or of Paddle Serving");
}

class Silent : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int, google::protobuf::io::ColumnNumber, const std::string&) override {}
};

template <typename Message>
Message read_prototxt(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw InputError(path + ": can't be read; start the server with python -m paddle_serving_server.serve");
  const std::string content(std::istreambuf_iterator<char>(file), {});
  Message message;
  Silent silent;
  google::protobuf::TextFormat::Parser parser;
  parser.AllowUnknownField(true);
  parser.RecordErrorsTo(&silent);
  if (!parser.ParseFromString(content, &message)) throw InputError(path + ": isn't what Paddle Serving writes there");
  return message;
}

std::string join(const std::string& folder, const std::string& name) {
  return folder.empty() ? name : folder + "/" + name;
}

// Throws InputError where this machine's Paddle can't do what the options ask for.
void check_device(bool use_gpu, bool use_trt, int precision) {
#ifdef SERVING_WITHOUT_GPU
  if (use_gpu) throw InputError("--gpu_id: the installed Paddle has no GPU support; leave it out");
#endif
  if (use_trt) throw InputError("--use_trt: Paddle 3 runs its graphs without TensorRT; leave it out");
  if (use_gpu) return;
  if (precision == SERVING_FP16) throw InputError("--precision FP16: a CPU doesn't compute in it; use fp32");
  if (precision == SERVING_BF16 && !__builtin_cpu_supports("avx512bf16")) {
    throw InputError("--precision bf16: this CPU lacks avx512_bf16; use fp32");
  }
}

// Throws InputError for options of Paddle Serving that would change what computes, or from what, and can't here.
void check_supported(const Flags& flags, const model_config::EngineDesc& engine) {
  const std::pair<std::string, bool> unsupported[] = {{"--use_lite", engine.use_lite()},
                                                      {"--use_xpu", engine.use_xpu()},
                                                      {"--use_ascend_cl", engine.use_ascend_cl()},
                                                      {"--use_encryption_model", engine.encrypted_model()},
                                                      {"--use_dist_model", engine.enable_dist_model()}};
  for (const auto& [name, is_set] : unsupported)
    if (is_set || flags.count(name.substr(2))) throw InputError(name + ": isn't supported; leave it out");
}

int read_precision(const std::string& given) {
  std::string name = given;
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  if (name == "fp32") return SERVING_FP32;
  if (name == "bf16") return SERVING_BF16;
  if (name == "fp16") return SERVING_FP16;
  throw InputError("--precision " + given + ": use fp32, bf16 or fp16");
}

// Finds the graph and the weights that export_to_serving.py put into a folder.
void find_model_files(const std::string& folder, Model& model) {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const auto& path = entry.path();
    if (path.extension() != kGraphSuffix) continue;
    auto weights = path;
    weights.replace_extension(kWeightsSuffix);
    if (!std::filesystem::is_regular_file(weights)) continue;
    model.graph_file = path.string();
    model.weights_file = weights.string();
    return;
  }
  throw InputError(folder + ": has no graph (.json) with its weights (.pdiparams); write it with export_to_serving.py");
}

void read_names(const model_config::GeneralModelConfig& config, const std::string& path, Model& model) {
  bool input_ids = false, token_type_ids = false;
  for (const auto& input : config.feed_var()) {
    if (input.name() == "input_ids") {
      input_ids = true;
      model.input_ids_alias = input.alias_name();
    } else if (input.name() == "token_type_ids") {
      token_type_ids = true;
      model.token_type_ids_alias = input.alias_name();
    }
  }
  if (!input_ids || !token_type_ids || config.fetch_var_size() != 1)
    throw InputError(path +
                     ": has to name input_ids, token_type_ids and one output; write it with export_to_serving.py");
  model.output_name = config.fetch_var(0).name();
  model.output_alias = config.fetch_var(0).alias_name();
}

}  // namespace

std::optional<Options> parse_options(int argc, char** argv) {
  const Flags flags = read_flags(argc, argv);
  if (flags.count("check")) {
    const std::string model = text(flags, "model", "");
    if (!std::filesystem::is_regular_file(join(model, kServerConfig)))
      throw InputError("--model " + model + ": has no " + kServerConfig + "; name what export_to_serving.py wrote");
    number(flags, "port", 0, 0, 65535);
    number_or_variable(flags, "idle_timeout_s", 1, 1, kMaxIdleTimeout);
    check_supported(flags, {});
    const std::string gpu = text(flags, "gpu_ids", text(flags, "gpu_id", "-1"));
    check_device(gpu != "-1", flags.count("use_trt"), read_precision(text(flags, "precision", "fp32")));
    return {};
  }
  check_names(flags);
  report_other_variables();
  Options options;
  // Paddle Serving has no option for it; web_service.py reads the same variable.
  if (const char* const host = std::getenv("SERVING_HOST"); host && *host) options.host = host;
  options.host = text(flags, "host", options.host);
  if (options.host.size() > 2 && options.host.front() == '[' && options.host.back() == ']')  // as in URLs
    options.host = options.host.substr(1, options.host.size() - 2);
  options.port = static_cast<unsigned short>(number(flags, "port", options.port, 0, 65535));
  options.threads = static_cast<int>(number(flags, "num_threads", options.threads, 1, 1024));
  // Paddle Serving asks for half a gigabyte when it isn't told anything; no request of kMaxTexts texts needs that.
  options.max_body_bytes = static_cast<size_t>(std::min<int64_t>(
      number(flags, "max_body_size", static_cast<int64_t>(options.max_body_bytes), 1, int64_t{1} << 40),
      static_cast<int64_t>(options.max_body_bytes)));
  const auto queued = static_cast<int64_t>(options.max_queued_texts);
  const bool old_name = flags.count("max_waiting_texts") && !flags.count("max_queued_texts");
  options.max_queued_texts =
      static_cast<size_t>(old_name ? number(flags, "max_waiting_texts", queued, 1, 1 << 20)
                                   : number_or_variable(flags, "max_queued_texts", queued, 1, 1 << 20));

  options.idle_timeout_s =
      static_cast<int>(number_or_variable(flags, "idle_timeout_s", options.idle_timeout_s, 1, kMaxIdleTimeout));

  const std::string resource_file =
      join(text(flags, "resource_path", ""), text(flags, "resource_file", "resource.prototxt"));
  const auto resource = read_prototxt<model_config::ResourceConf>(resource_file);
  if (resource.model_toolkit_file_size() != 1 || resource.model_toolkit_path_size() != 1 ||
      resource.general_model_file_size() != 1 || resource.general_model_path_size() != 1)
    throw InputError("--model: give one model folder");
  const auto toolkit = read_prototxt<model_config::ModelToolkitConf>(
      join(resource.model_toolkit_path(0), resource.model_toolkit_file(0)));
  if (toolkit.engines_size() != 1) throw InputError("--model: give one model folder");
  const auto& engine = toolkit.engines(0);
  check_supported(flags, engine);
  options.precision = read_precision(text(flags, "precision", "fp32"));
  if (flags.count("enable_prometheus"))
    throw InputError("--enable_prometheus: this server has no metrics; leave it out, or use web_service.py's /metrics");
  const bool use_gpu = engine.use_gpu() || (engine.gpu_ids_size() && engine.gpu_ids(0) >= 0);
  check_device(use_gpu, flags.count("use_trt") || engine.use_trt(), options.precision);
  if (use_gpu) options.gpu_id = engine.gpu_ids_size() ? engine.gpu_ids(0) : 0;

  if (engine.runtime_thread_num() > 0) options.threads = engine.runtime_thread_num();

  find_model_files(engine.model_dir(), options.model);
  const std::string names_file = join(resource.general_model_path(0), resource.general_model_file(0));
  read_names(read_prototxt<model_config::GeneralModelConfig>(names_file), names_file, options.model);
  return options;
}
