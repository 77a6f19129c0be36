#include "dist/gold.h"

#include <filesystem>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <unistd.h>

namespace safegrad::testing {

at::Tensor read_tensor(const TensorView& view) {
  at::Tensor result = at::empty(view.shape, at::kDouble);
  double* out = result.data_ptr<double>();
  for (int64_t i = 0; i < view.numel(); ++i) {
    auto as = [&]<typename T>(T value) {
      std::memcpy(&value, view.bytes.data() + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
      return static_cast<double>(value);
    };
    switch (view.dtype) {
      case Dtype::f64:
        out[i] = as(double{});
        break;
      case Dtype::f32:
        out[i] = as(float{});
        break;
      case Dtype::i64:
        out[i] = as(int64_t{});
        break;
      case Dtype::i32:
        out[i] = as(int32_t{});
        break;
      default:
        out[i] = as(uint8_t{});
    }
  }
  return result;
}

namespace {

// A slice of gold's sequences as a token file in the temporary folder, one a process.
std::unique_ptr<TokenFile> slice(const SafetensorsFile& gold, const std::string& stem,
                                 int64_t first, int64_t last) {
  const at::Tensor offsets = read_tensor(gold.at("offsets")).to(at::kLong);
  const int64_t begin = offsets[first].item<int64_t>(), end = offsets[last].item<int64_t>();
  const at::Tensor tokens =
      read_tensor(gold.at("tokens")).to(at::kInt).narrow(0, begin, end - begin).contiguous();
  const at::Tensor mask =
      read_tensor(gold.at("loss_mask")).to(at::kByte).narrow(0, begin, end - begin).contiguous();
  const at::Tensor bounds = (offsets.narrow(0, first, last - first + 1) - begin).contiguous();
  const std::string path =
      fmt::format("{}/safegrad-gold-{}-{}.safetensors",
                  std::filesystem::temp_directory_path().string(), getpid(), stem);
  SafetensorsWriter writer(path,
                           {{"tokens", Dtype::i32, {end - begin}},
                            {"loss_mask", Dtype::u8, {end - begin}},
                            {"offsets", Dtype::i64, {bounds.numel()}}},
                           {{"format", "safegrad.tokens/1"}});
  for (const at::Tensor& t : {tokens, mask, bounds}) {
    writer.append(
        {static_cast<const std::byte*>(t.const_data_ptr()), static_cast<size_t>(t.nbytes())});
  }
  writer.finish();
  std::vector<std::string> warnings;
  auto file =
      std::make_unique<TokenFile>(path, TokenFileExpectation{"", 1 << 20, 1 << 20}, warnings);
  std::filesystem::remove(path);  // it stays mapped
  return file;
}

class GoldWeights : public WeightSource {
 public:
  GoldWeights(std::unique_ptr<WeightSource> base, std::map<std::string, at::Tensor> tensors)
      : base_(std::move(base)), tensors_(std::move(tensors)) {}
  void read(const std::string& name, int64_t begin, int64_t end, float* out) const override {
    const auto found = tensors_.find(base_ ? name : "");
    if (found == tensors_.end()) return base_->read(name, begin, end, out);
    const at::Tensor flat = found->second.reshape({-1}).to(at::kFloat);
    std::copy(flat.data_ptr<float>() + begin, flat.data_ptr<float>() + end, out);
  }

 private:
  std::unique_ptr<WeightSource> base_;
  std::map<std::string, at::Tensor> tensors_;
};

}  // namespace

Gold::Gold(const std::string& name)
    : folder_(std::string(SAFEGRAD_SOURCE_DIR) + "/tests/gold/data/" + name),
      file_(folder_ + "/gold.safetensors") {
  const auto task_sequences = static_cast<int64_t>(number("n_task_sequences"));
  task_ = slice(file_, "task", 0, task_sequences);
  align_ = slice(file_, "align", task_sequences, file_.at("offsets").numel() - 1);
}

at::Tensor Gold::tensor(const std::string& name) const {
  return read_tensor(file_.at(name));
}
double Gold::number(const std::string& name) const {
  return tensor(name).item<double>();
}

std::vector<std::string> Gold::names(const std::string& prefix) const {
  std::vector<std::string> result;
  for (const auto& [name, view] : file_.tensors()) {
    if (name.starts_with(prefix)) result.push_back(name.substr(prefix.size()));
  }
  return result;
}

std::vector<ObjectiveData> Gold::objectives(bool all_positions) const {
  ObjectiveData align{align_.get(), all_positions, {}};
  const at::Tensor hidden =
      tensor(all_positions ? "reference_hidden_all" : "reference_hidden").to(at::kFloat);
  std::vector<int64_t> first = {0};
  for (int64_t i = 0; i < align_->size(); ++i)
    first.push_back(first.back() + scored_rows(align, i));
  align.reference = [=](int64_t i) {
    const auto n = static_cast<size_t>(i);
    return hidden.narrow(0, first[n], first[n + 1] - first[n]);
  };
  return {{task_.get(), false, {}}, align};
}

std::vector<Draw> Gold::draws(int rank, int ranks) const {
  std::vector<Draw> mine;
  int turn = 0;
  for (int64_t i = 0; i < task_->size(); ++i) {
    if (turn++ % ranks == rank) mine.push_back({0, i});
  }
  for (int64_t i = 0; i < align_->size(); ++i) {
    if (turn++ % ranks == rank) mine.push_back({1, i});
  }
  return mine;
}

std::unique_ptr<WeightSource> Gold::weights_with_adapters(
    std::unique_ptr<WeightSource> base) const {
  std::map<std::string, at::Tensor> adapters;
  for (const std::string& name : names("lora.model."))
    adapters["model." + name] = tensor("lora.model." + name);
  return std::make_unique<GoldWeights>(std::move(base), std::move(adapters));
}

std::unique_ptr<WeightSource> Gold::reference_head() const {
  return std::make_unique<GoldWeights>(
      nullptr, std::map<std::string, at::Tensor>{{"", tensor("reference_head")}});
}

std::map<std::string, at::Tensor> gather_gradients(dist::Engine& engine, dist::Mesh& mesh,
                                                   size_t k) {
  std::map<std::string, at::Tensor> result;
  for (const dist::ShardedUnit& unit : engine.units()) {
    if (!unit.trains()) continue;
    const at::Tensor shard = unit.gradient_shard(k);
    at::Tensor full = at::empty({shard.numel() * mesh.shards()}, shard.options());
    mesh.shard_group().all_gather(full, shard)->wait();
    full = full.cpu();
    int64_t offset = 0;
    for (const Parameter* p : unit.unit().parameters) {
      if (!p->trainable) continue;
      const int64_t row = p->numel() / p->shape[0];
      for (const Piece& piece : p->pieces) {
        std::vector<int64_t> shape = p->shape;
        shape[0] = piece.rows;
        result[piece.name] =
            full.narrow(0, offset + piece.row * row, piece.rows * row).view(shape).to(at::kDouble);
      }
      offset += p->numel();
    }
  }
  return result;
}

double relative_error(const at::Tensor& a, const at::Tensor& b) {
  return ((a.to(at::kDouble) - b).norm() / b.norm()).item<double>();
}

}  // namespace safegrad::testing
