// Explain with a .pt2 package, by the loader in torch's own library: no Python, no autograd.
//
//   explain PACKAGE.pt2 IN.bin OUT_outputs.bin OUT_map.bin [TARGET]
//
// IN.bin holds float32 [B, ...] in row-major order, of the shape that the package is for; TARGET is a class, or -1, the default, for
// the predicted one. The outputs and the map are written in the same form. As `sp_fx.load` does, it serves only a package for this
// torch whose answer to its probe is the one that was packaged; that no byte was altered is for `sp_fx.load` to say.
#include <torch/torch.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

using torch::inductor::AOTIModelPackageLoader;

// -- the manifest: JSON as Python's `json.dumps` writes it

static size_t after_string(const std::string& text, size_t i) {
  for (++i; text.at(i) != '"'; ++i)
    if (text[i] == '\\') ++i;
  return i + 1;
}

static size_t after_value(const std::string& text, size_t i) {
  for (int depth = 0;; ++i) {
    if (text.at(i) == '"') i = after_string(text, i) - 1;
    else if (text[i] == '{' || text[i] == '[') ++depth;
    else if (depth > 0 && (text[i] == '}' || text[i] == ']')) --depth;
    else if (depth == 0 && (text[i] == ',' || text[i] == '}' || text[i] == ']')) return i;
  }
}

// The text of what stands under `key` in the object `text`.
static std::string under(const std::string& text, const std::string& key) {
  for (size_t i = 1; text.at(i) == '"';) {
    size_t colon = after_string(text, i), end = after_value(text, colon + 2);
    if (text.substr(i + 1, colon - i - 2) == key) return text.substr(colon + 2, end - colon - 2);
    if (text.at(end) == '}') break;
    i = end + 2;
  }
  throw std::runtime_error("the manifest has no " + key);
}

// Every number in `text`, which may be nested lists of them; of `[[...], [...]]` the first list alone.
static std::vector<double> numbers(const std::string& text) {
  std::vector<double> found;
  const char* at = text.c_str();
  while (*at == '[') ++at;
  for (char* end; *at && *at != ']'; at = end + (*end == ',' ? 2 : 0)) found.push_back(std::strtod(at, &end));
  return found;
}

// -- the probe, as `sp_fx/packages/probe.py` has it

static float weyl(uint64_t i) {
  uint32_t x = static_cast<uint32_t>(2654435769u * (i + 1));
  x = (x ^ x >> 15) * 2246822519u;
  return static_cast<float>((x >> 8) / 8388608.0 - 1);
}

static std::vector<double> first(const at::Tensor& values) {
  auto flat = values.to(at::kCPU, at::kDouble).contiguous().view({-1});
  return {flat.data_ptr<double>(), flat.data_ptr<double>() + std::min<int64_t>(flat.numel(), 256)};
}

static std::vector<double> sketch(const at::Tensor& map) {
  auto flat = map.to(at::kCPU, at::kDouble).contiguous().view({-1});
  std::vector<double> sums(256);
  for (int64_t i = 0; i < flat.numel(); ++i) sums[i % 256] += flat.data_ptr<double>()[i] * (weyl(i) < 0 ? -1 : 1);
  return sums;
}

static void close(const char* kind, const std::vector<double>& found, const std::vector<double>& wanted, double tolerance) {
  double apart = 0, size = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    apart += std::pow(found.at(i) - wanted[i], 2);
    size += std::pow(wanted[i], 2);
  }
  double error = std::sqrt(apart / std::max(size, 1e-60));
  if (!(error <= tolerance))
    throw std::runtime_error(std::string("the package does not answer its probe: relative L2 distance of its ") + kind + " " +
                             std::to_string(error) + " above " + std::to_string(tolerance));
}

// -- explaining

static std::vector<at::Tensor> explain(AOTIModelPackageLoader& loader, const at::Tensor& x, int64_t target) {
  return loader.run({x, at::full({x.size(0)}, target, at::TensorOptions(at::kLong).device(x.device()))});
}

static void write(const at::Tensor& tensor, const char* path) {
  auto held = tensor.to(at::kCPU).contiguous();
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(held.data_ptr()), held.nbytes());
  if (!file) throw std::runtime_error(std::string("cannot write ") + path);
}

int main(int count, char** given) try {
  if (count < 5 || count > 6) {
    std::cerr << "usage: explain PACKAGE.pt2 IN.bin OUT_outputs.bin OUT_map.bin [TARGET]\n";
    return 2;
  }
  auto metadata = AOTIModelPackageLoader::load_metadata_from_package(given[1], "model");  // before any of its code is loaded
  const std::string& manifest = metadata["sp_fx"];
  if (manifest.empty()) throw std::runtime_error(std::string(given[1]) + " is no package of sp_fx");
  std::string made = under(under(manifest, "versions"), "torch");
  char* dot;
  long major = std::strtol(made.c_str() + 1, &dot, 10), minor = std::strtol(dot + 1, nullptr, 10);
  if (std::pair(major, minor) > std::pair<long, long>(TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR))
    throw std::runtime_error("the package was compiled by torch " + made + ", and this is torch " TORCH_VERSION);
  std::string inputs = under(manifest, "inputs"), input = inputs.substr(1, inputs.size() - 2);
  if (after_value(inputs, 1) != inputs.size() - 1 || under(manifest, "looped") == "true" || under(manifest, "target") != "\"class\"" ||
      under(input, "dtype") != "\"float32\"")
    throw std::runtime_error("this example runs packages of one float32 input, class targets and one graph; unroll an ascent");
  std::vector<int64_t> shape{-1};
  for (double axis : numbers(under(input, "shape"))) shape.push_back(static_cast<int64_t>(axis));

  c10::InferenceMode guard;
  at::Device device = metadata["AOTI_DEVICE_KEY"] == "cpu" ? at::kCPU : at::kCUDA;
  AOTIModelPackageLoader loader(given[1]);

  std::string probe = under(manifest, "probe");
  double tolerance = numbers(under(probe, "tolerance")).at(0);
  at::Tensor asked = at::empty({static_cast<int64_t>(numbers(under(probe, "batch")).at(0)) * c10::multiply_integers(shape) * -1});
  for (int64_t i = 0; i < asked.numel(); ++i) asked.data_ptr<float>()[i] = weyl(i);
  auto answer = explain(loader, asked.view(shape).to(device), 0);
  close("outputs", first(answer.front()), numbers(under(probe, "outputs")), tolerance);
  close("map", sketch(answer.back()), numbers(under(probe, "maps")), tolerance);

  std::ifstream file(given[2], std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(std::string("cannot read ") + given[2]);
  int64_t bytes = file.tellg(), sample = -c10::multiply_integers(shape) * int64_t(sizeof(float));
  if (bytes == 0 || bytes % sample)
    throw std::runtime_error(std::string(given[2]) + " has " + std::to_string(bytes) + " bytes, not a multiple of a sample's " +
                             std::to_string(sample));
  at::Tensor x = at::empty({bytes / int64_t(sizeof(float))});
  file.seekg(0).read(static_cast<char*>(x.data_ptr()), bytes);
  auto results = explain(loader, x.view(shape).to(device), count == 6 ? std::stoll(given[5]) : -1);
  write(results.front(), given[3]);  // the model's output
  write(results.back(), given[4]);   // the map
  std::cout << "outputs " << results.front().sizes() << ", map " << results.back().sizes() << "\n";
  return 0;
} catch (const c10::Error& error) {
  std::cerr << "explain: " << error.what_without_backtrace() << "\n";
  return 1;
} catch (const std::exception& error) {
  std::cerr << "explain: " << error.what() << "\n";
  return 1;
}
