#include "dist/reference_cache.h"

#include <exception>
#include <filesystem>

#include <ATen/ATen.h>

#include "core/error.h"
#include "core/random.h"
#include "dist/run_shape.h"

namespace safegrad::dist {
namespace {

std::span<const std::byte> bytes_of(const at::Tensor& t) {
  return {static_cast<const std::byte*>(t.const_data_ptr()), static_cast<size_t>(t.nbytes())};
}

}  // namespace

ReferenceCache::ReferenceCache(Engine& engine, Mesh& mesh, const ObjectiveData& data,
                               uint64_t model_fingerprint, int64_t max_tokens,
                               const std::string& folder)
    : dtype_(engine.compute_dtype()), width_(engine.model().width()) {
  uint64_t key = mix64(model_fingerprint, data.file->fingerprint());
  key = mix64(key, data.all_positions ? 1 : 0);
  key = mix64(key, static_cast<uint64_t>(dtype_));  // another model of the same master weights
  stem_ = fmt::format("{}/{:016x}", folder, key);
  Communicator& world = mesh.world();
  int parts = parts_on_disk(world);
  if (parts == 0) {
    agree(world, [&] {
      std::error_code failed;
      std::filesystem::create_directories(folder, failed);
      SAFEGRAD_CHECK(!failed, RunError, "{}: cannot make this folder: {}", folder,
                     failed.message());
    });
    compute(engine, mesh, data, max_tokens);
    parts = world.size();
  }
  agree(world, [&] { map_parts(parts, data, width_); });
}

std::string ReferenceCache::part_path(int part, int parts) const {
  return fmt::format("{}-part-{}-of-{}.safetensors", stem_, part, parts);
}

// Rank 0 looks, all ranks follow: what one rank sees on disk must not decide its control flow
// alone.
int ReferenceCache::parts_on_disk(Communicator& world) const {
  int found = 0;
  if (world.rank() == 0) {
    const std::filesystem::path stem(stem_);
    std::error_code none;
    for (const auto& entry : std::filesystem::directory_iterator(stem.parent_path(), none)) {
      int part = 0, parts = 0;
      const std::string name = entry.path().filename().string();
      const std::string format = stem.filename().string() + "-part-%d-of-%d.safetensors";
      if (std::sscanf(name.c_str(), format.c_str(), &part, &parts) != 2 || parts < 1 ||
          parts > 1 << 20)
        continue;
      int present = 0;
      while (present < parts && std::filesystem::exists(part_path(present, parts))) ++present;
      if (present == parts) found = parts;
    }
  }
  return std::stoi(world.broadcast(std::to_string(found), 0));
}

void ReferenceCache::compute(Engine& engine, Mesh& mesh, const ObjectiveData& data,
                             int64_t max_tokens) {
  const auto rank = static_cast<size_t>(mesh.world().rank());
  const StepPlan plan = plan_all(data, mesh.world().size(), max_tokens);
  int64_t rows = 0;
  std::vector<int64_t> samples;
  for (const auto& micro_batch : plan.assignment) {
    for (const Draw& draw : micro_batch[rank]) {
      samples.push_back(draw.sample);
      rows += scored_rows(data, draw.sample);
    }
  }
  std::unique_ptr<SafetensorsWriter> writer;
  agree(mesh.world(), [&] {
    writer = std::make_unique<SafetensorsWriter>(
        part_path(mesh.world().rank(), mesh.world().size()),
        std::vector<SafetensorsWriter::Entry>{
            {"hidden", Dtype::f32, {rows, width_}},
            {"samples", Dtype::i64, {static_cast<int64_t>(samples.size())}}},
        std::map<std::string, std::string>{{"format", "safegrad.reference/1"}});
  });
  ObjectiveData scored = data;
  scored.reference = nullptr;  // being computed
  std::exception_ptr failed;   // told after the loop: the others would wait for a rank that left it
  for (const auto& micro_batch : plan.assignment) {
    PackedBatch batch = upload(pack(micro_batch[rank], {scored}, {}), engine.backend());
    batch.adapters = false;
    const at::Tensor hidden = engine.hidden(batch).to(at::kCPU, at::kFloat).contiguous();
    try {
      if (!failed) writer->append(bytes_of(hidden));
    } catch (const RunError&) {
      failed = std::current_exception();
    }
  }
  agree(mesh.world(), [&] {
    if (failed) std::rethrow_exception(failed);
    writer->append(std::as_bytes(std::span(samples)));
    writer->finish();
  });
}

void ReferenceCache::map_parts(int parts, const ObjectiveData& data, int64_t width) {
  places_.assign(static_cast<size_t>(data.file->size()), {0, -1, 0});
  for (int part = 0; part < parts; ++part) {
    const std::string path = part_path(part, parts);
    SAFEGRAD_CHECK(
        std::filesystem::exists(path), RunError,
        "{}: not visible on this rank; `output` must be on a file system that all ranks share",
        path);
    parts_.emplace_back(path);
    const TensorView& samples = parts_.back().at("samples");
    const TensorView& hidden = parts_.back().at("hidden");
    SAFEGRAD_CHECK(samples.dtype == Dtype::i64 && hidden.dtype == Dtype::f32 &&
                       hidden.shape.size() == 2 && hidden.shape[1] == width,
                   DataError,
                   "{}: damaged reference cache; delete its folder to have it computed again",
                   path);
    int64_t row = 0;
    for (int64_t i = 0; i < samples.numel(); ++i) {
      int64_t sample = 0;
      std::memcpy(&sample, samples.bytes.data() + i * 8, 8);
      SAFEGRAD_CHECK(sample >= 0 && sample < data.file->size(), DataError,
                     "{}: damaged reference cache; delete its folder to have it computed again",
                     path);
      const int64_t rows = scored_rows(data, sample);
      places_[static_cast<size_t>(sample)] = {static_cast<size_t>(part), row, rows};
      row += rows;
    }
    SAFEGRAD_CHECK(
        row == hidden.shape[0], DataError,
        "{}: {} rows for samples that have {}; delete its folder to have it computed again", path,
        hidden.shape[0], row);
  }
  for (size_t i = 0; i < places_.size(); ++i) {
    SAFEGRAD_CHECK(places_[i].row >= 0, DataError,
                   "{}: sequence {} is missing from the reference cache; delete its folder to have "
                   "it computed again",
                   stem_, i);
  }
}

at::Tensor ReferenceCache::rows(int64_t sample) const {
  const Place& place = places_[static_cast<size_t>(sample)];
  const TensorView& hidden = parts_[place.part].at("hidden");
  at::Tensor rows = at::empty({place.rows, width_}, at::kFloat);
  read_as_float(hidden, place.row * width_, (place.row + place.rows) * width_,
                rows.data_ptr<float>());
  return rows.to(dtype_);
}

}  // namespace safegrad::dist
