// fuzz_manifest.cpp: any texts as the files of a checkpoint: nothing outside its folder is meant,
// and a manifest that is taken can be written and is read back as the same.
#include <filesystem>
#include <string>
#include <vector>

#include <stdlib.h>

#include "core/sha256.h"
#include "dist/checkpoint_files.h"
#include "fuzz/fuzz_input.h"

namespace safegrad::fuzz {
namespace {

namespace fs = std::filesystem;

/// A folder of one checkpoint with one shard, removed at the end of the process. Its texts are
/// links to files in memory.
class Checkpoints {
 public:
  Checkpoints() {
    std::string pattern = (fs::temp_directory_path() / "safegrad.fuzz.XXXXXX").string();
    require(::mkdtemp(pattern.data()) != nullptr, "a temporary folder can be made");
    path_ = pattern;
    fs::create_directory(step());
    fs::create_symlink(shard_.path(), step() + "/" + dist::shard_name(0, 1));
    fs::create_symlink(manifest.path(), step() + "/manifest.json");
    fs::create_symlink(sums.path(), step() + "/SHA256SUMS");
    fs::create_symlink(latest.path(), path() + "/latest");
  }
  ~Checkpoints() { fs::remove_all(path_); }

  const std::string& path() const { return path_; }
  std::string step() const { return path_ + "/" + dist::checkpoint_name(100); }

  MemoryFile manifest, sums, latest;

 private:
  std::string path_;
  MemoryFile shard_{"the shard"};
};

void check_manifest(const std::string& text) {
  dist::Manifest manifest;
  if (!takes([&] { manifest = dist::parse_manifest(text, "manifest"); })) return;
  const dist::Manifest again = dist::parse_manifest(dist::to_json(manifest), "again");
  require(dist::differences(manifest, again).empty(), "a manifest is read as written");
  require(again.step == manifest.step && again.updates == manifest.updates &&
              again.shards == manifest.shards,
          "a manifest's numbers are read as written");
  dist::differences(manifest, {});
}

void check_folder(Checkpoints& folder, std::string_view manifest, std::string_view sums,
                  std::string_view latest) {
  folder.manifest.assign(manifest);
  // A right checksum of the manifest stands first, so that what comes after it is reached.
  const std::string sum = sha256_of_file(folder.manifest.path()) + "  manifest.json\n";
  folder.sums.assign(sum + std::string(sums));
  folder.latest.assign(latest);
  takes([&] { dist::verify_checkpoint(folder.step(), 0, 1); });
  std::vector<std::string> warnings;
  takes([&] {
    const auto found = dist::find_latest(folder.path(), warnings);
    require(found == folder.step(), "the newest checkpoint is the one that is there");
  });
}

}  // namespace
}  // namespace safegrad::fuzz

// The input: manifest.json, the rest of SHA256SUMS and `latest`, with a zero byte between them.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace safegrad;
  static fuzz::Checkpoints folder;
  std::string_view rest = fuzz::as_text(data, size);
  const std::string_view manifest = fuzz::take_part(rest), sums = fuzz::take_part(rest);
  fuzz::check_manifest(std::string(manifest));
  fuzz::check_folder(folder, manifest, sums, rest);
  return 0;
}
