// checkpoint.h: saves what a training step changes while training goes on, and takes it up again on
// any layout.
//
// One file for each rank of the first replica, with tensors NAME.master, NAME.m, NAME.v (f32, flat)
// for every unit that trains, and NAME.align where the next step uses the last alignment gradient
// (as a sum over its tokens), NAME.anchor where it uses rule lisa's anchor: elements [begin, end)
// of the unit's trainable parameters laid end to end, without padding. The metadata under the
// unit's name says which. With objective.gate the first file also has gate.scores (f64, one a task
// sample, NaN: never scored). Frozen weights come from where training started. Samples and dropout
// follow from the step's number.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "dist/checkpoint_files.h"
#include "dist/heartbeat.h"
#include "dist/trainer.h"

namespace safegrad::dist {

/// Writes the checkpoints of a run. All ranks construct it and call the same functions at the same
/// step boundaries. One checkpoint is under way at a time:
///   start    copies this rank's shards to host memory (training stands still); a thread writes
///            them, hashes them from that memory and syncs the file
///   advance  once no rank is still writing: the first time, rank 0's thread seals the checkpoint
///            and prunes old ones; the second time it is over
/// Threads touch files and plain memory only. Host memory: 12 bytes a trainable element of the
/// shard, 16 with objective.align_every, objective.gate or rule lisa, kept from one checkpoint to
/// the next.
class CheckpointWriter {
 public:
  /// `facts`: config, inputs and versions for the manifest, and as `step` where the run begins.
  /// `before_seal` runs on rank 0's thread: brings to the disk what must not be older than the
  /// checkpoint. `heartbeat`: of the threads, for a watchdog; a disk that hangs would hold up
  /// finish() and the destructor for ever. Removes what crashes left half-written. Collective.
  CheckpointWriter(Trainer& trainer, Mesh& mesh, std::string folder, const CheckpointSection& keep,
                   Manifest facts, Heartbeat& heartbeat, std::function<void()> before_seal = {});
  ~CheckpointWriter();  ///< breaks off what is under way, within the sync of a few pieces
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  /// Begins the checkpoint after `step` finished steps; finishes the one before it first.
  /// `keep_one_more`: than keep_last, where this one may not be worth an older one. Collective;
  /// JobFailed: a disk refused, or on some rank there is no memory or no thread.
  void start(int64_t step, bool keep_one_more = false);
  bool open() const { return phase_ != Phase::idle; }  ///< the same on every rank
  bool writing() const { return busy_; }               ///< this rank's thread is at work
  /// The next phase. Waits for this rank's thread. Collective; where a disk refused on any rank,
  /// JobFailed with its file and the system's text on all.
  void advance();
  void finish();  ///< advances until nothing is open

 private:
  enum class Phase { idle, writing, sealing };
  struct Copy;
  void run(std::function<void()> work);
  void copy_state();
  void write_shard();
  void seal(int64_t since, const std::vector<WrittenShard>& shards);

  Trainer& trainer_;
  Mesh& mesh_;
  std::string folder_;
  CheckpointSection keep_;
  bool keep_one_more_ = false;
  Manifest manifest_;
  Heartbeat& heartbeat_;
  std::function<void()> before_seal_;
  int64_t sealed_;  // step of the last checkpoint that was begun to be sealed
  std::vector<Copy> copies_;
  std::vector<double> scores_;  // of the gate
  WrittenShard own_;
  Phase phase_ = Phase::idle;
  std::atomic<bool> busy_{false}, broken_off_{false};
  std::exception_ptr failure_;
  std::thread thread_;
};

/// Replaces the trainer's weights and moments by those of the verified checkpoint in `folder`,
/// reading the ranges that this rank holds. Collective. JobFailed: a unit is missing, has other
/// parameters, or its shards leave a gap.
void restore_checkpoint(Trainer& trainer, Mesh& mesh, const std::string& folder,
                        const Manifest& manifest);

}  // namespace safegrad::dist
