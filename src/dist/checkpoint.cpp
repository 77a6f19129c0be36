#include "dist/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <span>

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "core/safetensors.h"
#include "core/sha256.h"

namespace safegrad::dist {
namespace {

constexpr const char* kTensors[] = {"master", "m", "v"};
constexpr const char* kAlign = "align";
constexpr const char* kAnchor = "anchor";
constexpr const char* kScores = "gate.scores";
constexpr int64_t kMostElements = int64_t{1} << 48;

/// What the metadata of a shard says about a unit.
struct Held {
  int64_t begin, end, numel;
  std::string trained;
};

std::string to_json(const Held& held) {
  return nlohmann::ordered_json{
      {"begin", held.begin}, {"end", held.end}, {"numel", held.numel}, {"trained", held.trained}}
      .dump();
}

Held parse_held(const std::string& text, const std::string& where) {
  const nlohmann::json parsed = parse_json(text, where);
  const JsonObject json(parsed, where);
  Held held;
  held.numel = json.integer("numel", 1, kMostElements);
  held.end = json.integer("end", 0, held.numel);
  held.begin = json.integer("begin", 0, held.end);
  held.trained = json.string("trained");
  return held;
}

constexpr size_t kWords = 5;

/// 64 hexadecimal digits and the size as words, which ranks can exchange. Zeros without digits.
std::vector<uint64_t> to_words(const WrittenShard& shard) {
  std::vector<uint64_t> words(kWords, 0);
  for (size_t i = 0; i < 4 && shard.digest.size() == 64; ++i)
    words[i] = std::stoull(shard.digest.substr(16 * i, 16), nullptr, 16);
  words[4] = static_cast<uint64_t>(shard.bytes);
  return words;
}

WrittenShard from_words(std::span<const uint64_t> words) {
  return {fmt::format("{:016x}{:016x}{:016x}{:016x}", words[0], words[1], words[2], words[3]),
          static_cast<int64_t>(words[4])};
}

}  // namespace

/// A unit's state on this rank as it was at the step boundary.
struct CheckpointWriter::Copy {
  std::string name;
  Held held;
  std::map<std::string, std::vector<float>> tensors;
};

CheckpointWriter::CheckpointWriter(Trainer& trainer, Mesh& mesh, std::string folder,
                                   const CheckpointSection& keep, Manifest facts,
                                   Heartbeat& heartbeat, std::function<void()> before_seal)
    : trainer_(trainer),
      mesh_(mesh),
      folder_(std::move(folder)),
      keep_(keep),
      manifest_(std::move(facts)),
      heartbeat_(heartbeat),
      before_seal_(std::move(before_seal)),
      sealed_(manifest_.step) {
  manifest_.ranks = mesh_.world().size();
  manifest_.shards = mesh_.shards();
  agree(mesh_.world(), [&] {
    if (mesh_.world().rank() == 0) remove_unfinished(folder_);
  });
}

CheckpointWriter::~CheckpointWriter() {
  broken_off_ = true;
  if (thread_.joinable()) thread_.join();
}

void CheckpointWriter::run(std::function<void()> work) {
  busy_ = true;
  thread_ = std::thread([this, work = std::move(work)] {
    try {
      work();
    } catch (...) {
      failure_ = std::current_exception();
    }
    heartbeat_.rest();
    busy_ = false;
  });
}

// Replicas hold the same shards: the first one writes.
void CheckpointWriter::start(int64_t step, bool keep_one_more) {
  finish();
  keep_one_more_ = keep_one_more;
  manifest_.step = step;
  manifest_.updates = trainer_.updates();
  manifest_.align.reset();
  if (const auto held = trainer_.kept_for(step))
    manifest_.align = {static_cast<int64_t>(held->tokens), held->loss, held->aa};
  own_ = {};
  // One rank alone may be out of memory or threads.
  agree(mesh_.world(), [&] {
    if (mesh_.world().rank() >= mesh_.shards()) return;
    try {
      copy_state();
      run([this] { write_shard(); });
    } catch (const std::exception& error) {
      throw RunError(
          fmt::format("rank {}: cannot begin the checkpoint after step {}: {}; it needs {} bytes "
                      "of host memory "
                      "for each trainable parameter that a rank holds, and a thread",
                      mesh_.world().rank(), step, error.what(),
                      manifest_.align || trainer_.needs_anchor(step) ? 16 : 12));
    }
  });
  phase_ = Phase::writing;
}

void CheckpointWriter::copy_state() {
  std::vector<ShardedUnit>& units = trainer_.engine().units();
  // All ranks have the same scores.
  if (trainer_.gate() && mesh_.world().rank() == 0) scores_ = trainer_.gate()->scores();
  copies_.resize(units.size());
  for (size_t u = 0; u < units.size(); ++u) {
    if (!units[u].trains()) continue;
    const ShardedUnit::State state = units[u].state();
    Copy& copy = copies_[u];
    copy.name = units[u].unit().name;
    copy.held = {state.begin, state.end, state.numel, units[u].trained()};
    // Of the last checkpoint; their memory is used again where the next step needs them, too.
    if (!manifest_.align) copy.tensors.erase(kAlign);
    if (!trainer_.needs_anchor(manifest_.step)) copy.tensors.erase(kAnchor);
    const int64_t n = state.end - state.begin;
    auto keep = [&](const char* name, const at::Tensor& from) {
      std::vector<float>& values = copy.tensors[name];
      values.resize(static_cast<size_t>(n));
      at::from_blob(values.data(), {n}, at::kFloat).copy_(from);
    };
    for (size_t t = 0; t < state.tensors.size(); ++t) keep(kTensors[t], state.tensors[t]);
    if (manifest_.align) keep(kAlign, units[u].gradient_shard(1).narrow(0, 0, n));
    if (trainer_.needs_anchor(manifest_.step)) keep(kAnchor, units[u].anchor().narrow(0, 0, n));
  }
}

// The checksum is of the copy. One of the file read back would come from the system's cache, and
// would be right for whatever a failing disk or memory made of it.
void CheckpointWriter::write_shard() {
  const std::string folder = folder_ + "/" + checkpoint_name(manifest_.step) + ".tmp";
  const std::string path = folder + "/" + shard_name(mesh_.shard_group().rank(), manifest_.shards);
  const std::string doing = "writing " + path;
  heartbeat_.beat(doing);
  make_folders(folder);

  std::vector<SafetensorsWriter::Entry> entries;
  std::map<std::string, std::string> metadata;
  for (const Copy& copy : copies_) {
    if (copy.name.empty()) continue;  // a frozen unit
    metadata[copy.name] = to_json(copy.held);
    for (const auto& [tensor, values] : copy.tensors) {
      entries.push_back(
          {copy.name + "." + tensor, Dtype::f32, {static_cast<int64_t>(values.size())}});
    }
  }
  if (!scores_.empty())
    entries.push_back({kScores, Dtype::f64, {static_cast<int64_t>(scores_.size())}});
  Sha256 hash;
  SafetensorsWriter writer(path, entries, metadata, &hash);
  // A job that fails waits for this thread: it looks up between pieces, and none is long to sync.
  constexpr size_t kPiece = size_t{1} << 22;       // floats
  constexpr int64_t kUnsynced = int64_t{1} << 26;  // bytes
  int64_t synced = 0;
  for (const Copy& copy : copies_) {
    for (const auto& [tensor, values] : copy.tensors) {
      for (size_t i = 0; i < values.size(); i += kPiece) {
        SAFEGRAD_CHECK(!broken_off_, RunError, "{}: broken off", path);
        writer.append(
            std::as_bytes(std::span(values).subspan(i, std::min(kPiece, values.size() - i))));
        heartbeat_.beat(doing);
        if (hash.bytes() - synced < kUnsynced) continue;
        writer.sync();
        heartbeat_.beat(doing);
        synced = hash.bytes();
      }
    }
  }
  if (!scores_.empty()) writer.append(std::as_bytes(std::span(scores_)));
  SAFEGRAD_CHECK(!broken_off_, RunError, "{}: broken off", path);
  writer.finish();
  own_ = {hash.hex(), hash.bytes()};
}

void CheckpointWriter::seal(int64_t since, const std::vector<WrittenShard>& shards) {
  const std::string name = folder_ + "/" + checkpoint_name(manifest_.step);
  heartbeat_.beat("bringing to the disk what goes before " + name);
  if (before_seal_) before_seal_();
  heartbeat_.beat("sealing " + name);
  seal_checkpoint(folder_, manifest_, shards);
  if (broken_off_) return;
  heartbeat_.beat("removing checkpoints before " + name);
  CheckpointSection keep = keep_;
  keep.keep_last += keep_one_more_;
  prune_checkpoints(folder_, since, manifest_.step, keep);
}

void CheckpointWriter::advance() {
  if (!open()) return;
  Communicator& world = mesh_.world();
  world.about("checkpoint");
  await_all(world, [this] { return busy_.load(); });
  if (thread_.joinable()) thread_.join();
  const Phase over = std::exchange(phase_, Phase::idle);
  agree(world, [&] {
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  });
  if (over == Phase::sealing) return;

  phase_ = Phase::sealing;
  const std::vector<uint64_t> words = world.all_gather_words(to_words(own_));
  agree(world, [&] {
    if (world.rank() != 0) return;
    std::vector<WrittenShard> shards;
    for (size_t i = 0; i < static_cast<size_t>(mesh_.shards()); ++i)
      shards.push_back(from_words(std::span(words).subspan(kWords * i, kWords)));
    const int64_t since = std::exchange(sealed_, manifest_.step);
    run([this, since, shards = std::move(shards)] { seal(since, shards); });
  });
}

void CheckpointWriter::finish() {
  while (open()) advance();
}

namespace {

/// The shards of a checkpoint, mapped, and who holds what of each unit.
class SavedState {
 public:
  SavedState(const std::string& folder, const Manifest& manifest) : folder_(folder) {
    for (int64_t i = 0; i < manifest.shards; ++i) {
      const SafetensorsFile& file =
          files_.emplace_back(folder + "/" + shard_name(i, manifest.shards));
      for (const auto& [unit, text] : file.metadata())
        units_[unit].emplace_back(parse_held(text, file.path() + ": " + printable(unit)), &file);
    }
  }

  /// Throws InputError unless the shards hold exactly the elements of the unit, each once.
  void check(const std::string& unit, const Held& wanted) const {
    const auto found = units_.find(unit);
    SAFEGRAD_CHECK(found != units_.end(), InputError, "{}: holds no state of {}", folder_, unit);
    int64_t next = 0;  // shards are in order
    for (const auto& [held, file] : found->second) {
      SAFEGRAD_CHECK(held.trained == wanted.trained && held.numel == wanted.numel, InputError,
                     "{}: {} trains {} ({} elements) there, and {} ({} elements) here; the state "
                     "of one is no state of the other",
                     file->path(), unit, printable(held.trained), held.numel,
                     printable(wanted.trained), wanted.numel);
      SAFEGRAD_CHECK(held.begin == next, InputError,
                     "{}: {} begins at element {}, {} are in the shards before it", file->path(),
                     unit, held.begin, next);
      next = held.end;
    }
    SAFEGRAD_CHECK(next == wanted.numel, InputError, "{}: has {} of the {} elements of {}", folder_,
                   next, wanted.numel, unit);
  }

  /// out <- elements [begin, end) of one tensor of a checked unit.
  void read(const std::string& unit, const char* tensor, int64_t begin, int64_t end,
            float* out) const {
    for (const auto& [held, file] : units_.at(unit)) {
      const int64_t from = std::max(begin, held.begin), to = std::min(end, held.end);
      const TensorView& view = file->at(unit + "." + tensor);
      SAFEGRAD_CHECK(view.dtype == Dtype::f32 && view.numel() == held.end - held.begin, InputError,
                     "{}: {}.{} has {} elements of {}, its metadata says {} of F32", file->path(),
                     unit, tensor, view.numel(), name_of(view.dtype), held.end - held.begin);
      if (from < to) read_as_float(view, from - held.begin, to - held.begin, out + (from - begin));
    }
  }

  /// The gate's scores of `samples` task samples; empty where none were saved. Throws InputError
  /// where they are of another number of samples.
  std::vector<double> scores(int64_t samples) const {
    const SafetensorsFile& file = files_.front();
    if (!file.tensors().contains(kScores)) return {};
    const TensorView& view = file.at(kScores);
    SAFEGRAD_CHECK(view.dtype == Dtype::f64 && view.numel() == samples, InputError,
                   "{}: {} has {} numbers of {}; data.task has {} samples, each with one of F64",
                   file.path(), kScores, view.numel(), name_of(view.dtype), samples);
    std::vector<double> scores(static_cast<size_t>(samples));
    std::memcpy(scores.data(), view.bytes.data(), view.bytes.size());
    return scores;
  }

  size_t units() const { return units_.size(); }
  /// All shards have this tensor of the unit.
  bool has(const std::string& unit, const char* tensor) const {
    const auto& held = units_.at(unit);
    return std::all_of(held.begin(), held.end(), [&](const auto& part) {
      return part.second->tensors().contains(unit + "." + tensor);
    });
  }

 private:
  std::string folder_;
  std::deque<SafetensorsFile> files_;  // pointers to them stay good
  std::map<std::string, std::vector<std::pair<Held, const SafetensorsFile*>>> units_;
};

// The checkpoint's task data, as far as its manifest says what that was.
bool is_of(const Manifest& manifest, const TokenFile& task) {
  const auto saved = manifest.inputs.find("data.task content");
  return saved == manifest.inputs.end() ||
         saved->second == fmt::format("{:016x}", task.fingerprint());
}

}  // namespace

void restore_checkpoint(Trainer& trainer, Mesh& mesh, const std::string& folder,
                        const Manifest& manifest) {
  std::vector<ShardedUnit>& units = trainer.engine().units();
  // A run that has become one without an alignment set has no use for its gradient.
  const bool holds = manifest.align && trainer.engine().objectives() > 1;
  const bool lisa = trainer.engine().keeps_anchor();
  mesh.world().barrier();  // shards may be others' memory too: nobody still reads them
  agree(mesh.world(), [&] {
    const SavedState saved(folder, manifest);
    size_t training = 0;
    for (const ShardedUnit& unit : units) {
      if (!unit.trains()) continue;
      ++training;
      const ShardedUnit::State state = unit.state();
      saved.check(unit.unit().name, {0, 0, state.numel, unit.trained()});
    }
    SAFEGRAD_CHECK(saved.units() == training, InputError,
                   "{}: holds the state of {} units, {} train here", folder, saved.units(),
                   training);
    for (ShardedUnit& unit : units) {
      if (!unit.trains()) continue;
      ShardedUnit::State state = unit.state();
      at::Tensor host = at::empty({state.end - state.begin}, at::kFloat);
      auto read = [&](const char* name, at::Tensor to) {
        saved.read(unit.unit().name, name, state.begin, state.end, host.data_ptr<float>());
        to.copy_(host);
      };
      for (size_t t = 0; t < state.tensors.size(); ++t) read(kTensors[t], state.tensors[t]);
      if (lisa && saved.has(unit.unit().name, kAnchor)) {
        unit.set_anchor();
        read(kAnchor, unit.anchor().narrow(0, 0, state.end - state.begin));
        trainer.hold_anchor();
      }
      if (holds) read(kAlign, unit.gradient_shard(1).narrow(0, 0, state.end - state.begin));
      unit.follow_master();
    }
    trainer.set_updates(manifest.updates);
    if (holds) {
      trainer.hold(
          {static_cast<double>(manifest.align->tokens), manifest.align->loss, manifest.align->aa});
    }
    // A run that has only now got a gate has no scores yet; other data has other samples.
    Gate* gate = trainer.gate();
    if (gate && is_of(manifest, *trainer.objective(0).file)) {
      std::vector<double> scores = saved.scores(static_cast<int64_t>(gate->scores().size()));
      if (!scores.empty()) gate->set_scores(std::move(scores));
    }
  });
  mesh.shard_group().finish_shard_writes();
}

}  // namespace safegrad::dist
