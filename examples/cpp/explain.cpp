// Explain with a .pt2 package, by the loader in torch's own library: no Python, no autograd.
//
//   explain PACKAGE.pt2 IN.bin OUT_outputs.bin OUT_map.bin BATCH TARGET AXIS...
//
// IN.bin holds float32 [BATCH, AXIS...] in row-major order; TARGET is a class, or -1 for the predicted one. The outputs and the map
// are written in the same form. No manifest is read or checked here: `sp_fx.load` does so, on the same file.
#include <torch/torch.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>

static void write(const at::Tensor& tensor, const char* path) {
  auto held = tensor.to(at::kCPU).contiguous();
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(held.data_ptr()), held.nbytes());
  if (!file) throw std::runtime_error(std::string("cannot write ") + path);
}

int main(int count, char** given) try {
  if (count < 8) {
    std::cerr << "usage: explain PACKAGE.pt2 IN.bin OUT_outputs.bin OUT_map.bin BATCH TARGET AXIS...\n";
    return 2;
  }
  std::vector<int64_t> shape{std::stoll(given[5])};
  for (int i = 7; i < count; ++i) shape.push_back(std::stoll(given[i]));
  at::Tensor x = at::empty(shape, at::kFloat);
  std::ifstream file(given[2], std::ios::binary);
  file.read(static_cast<char*>(x.data_ptr()), x.nbytes());
  if (file.gcount() != static_cast<std::streamsize>(x.nbytes()) || file.peek() != EOF)
    throw std::runtime_error(std::string(given[2]) + " does not hold the numbers of that shape");

  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader loader(given[1]);
  auto metadata = loader.get_metadata();
  if (metadata["AOTI_DEVICE_KEY"] != "cpu") x = x.to(at::kCUDA);
  at::Tensor target = at::full({shape[0]}, std::stoll(given[6]), at::TensorOptions(at::kLong).device(x.device()));
  auto results = loader.run({x, target});  // the model's output, then the map
  write(results.front(), given[3]);
  write(results.back(), given[4]);
  std::cout << "outputs " << results.front().sizes() << ", map " << results.back().sizes() << "\n";
  return 0;
} catch (const c10::Error& error) {
  std::cerr << "explain: " << error.what_without_backtrace() << "\n";
  return 1;
} catch (const std::exception& error) {
  std::cerr << "explain: " << error.what() << "\n";
  return 1;
}
