// metrics.h: what a run tells: one JSON line a step on disk, one live line on the terminal.
#pragma once
#include <array>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/loss_spike.h"
#include "core/not_finite.h"

namespace safegrad {

/// Of layer-wise surgery: smallest and largest coefficient of a block that trains, and in how many
/// of these the two gradients conflict.
struct BlockCoefficients {
  std::array<double, 2> task = {0, 0}, align = {0, 0};
  int64_t conflicts = 0;
};

/// The measurements of one optimizer step, already reduced over all ranks. Keys on disk equal the
/// member names. uu, ua, aa: inner products of the per-token mean gradients before clipping (a:
/// alignment; absent with one objective).
struct StepRecord {
  int64_t step = 0;      ///< 1-based: the number of finished steps
  double epoch = 0;      ///< passes over the task data so far
  double loss_task = 0;  ///< NaN, as uu, in a step that computed no task gradient
  std::optional<double> loss_align, ua, aa, cosine, c_align;
  /// With objective.align_every > 1: this step computed the alignment gradient; if not, loss_align
  /// and aa are of the last step that did, and ua is of this step's task gradient with that one.
  std::optional<bool> align_renewed;
  std::optional<int64_t> gated;  ///< with objective.gate: task draws that the step left out
  double uu = 0;
  bool conflict = false;
  double c_task = 1;
  /// With rule lisa: |w − anchor|, and the weight of the proximal term that it is the gradient of.
  std::optional<double> drift, c_drift;
  /// With layer-wise surgery, whose c_task and c_align are means over blocks that train.
  std::optional<BlockCoefficients> block_coefficients;
  double grad_norm = 0;  ///< of the combined gradient, before clipping
  double clip = 1;       ///< factor that clipping applied
  double lr = 0;
  int64_t task_tokens = 0, align_tokens = 0;  ///< all tokens, scored or not
  double seconds = 0;
  double tokens_per_s = 0;
  double flops = 0;           ///< of the necessary matrix products (docs/plan.md), all ranks
  double speed_of_light = 0;  ///< share of the shortest time for the necessary matrix products
  /// Most memory that the fullest rank has held so far (Backend::peak_bytes), as it stood when this
  /// step's gradients were there; absent where the system does not say.
  std::optional<int64_t> memory_bytes;
  /// Time that training stood still for a checkpoint after this step, on rank 0.
  std::optional<double> checkpoint_seconds;
  bool skipped = false;                         ///< a scalar was NaN or infinite: no rank stepped
  std::optional<NotFinite> not_finite;          ///< of a skipped step: what
  std::optional<LossSpike> loss_spike;          ///< loss_task stood out; see LossSpikeRule
  std::map<std::string, double> phase_seconds;  ///< of rank 0
  std::map<std::string, std::map<std::string, double>>
      probe;  ///< name -> class or measure -> value
  std::map<std::string, std::map<std::string, double>>
      blocks;  ///< name -> uu, ua, aa (c_task, c_align)
};

/// One line of JSON without a newline; absent values and empty maps are left out. Numbers read back
/// to the same bits; NaN and infinities become null (JSON has none).
std::string to_json_line(const StepRecord& record);

/// Appends to a file, a line a step, which others can read at once. A line that a crash cut short
/// is ended first, so that it spoils no line but itself. Throws RunError (path, the system's text)
/// if the disk refuses.
class MetricsFile {
 public:
  explicit MetricsFile(const std::string& path);
  void write(const StepRecord& record);
  /// Lines written before survive a crash of the machine. While another thread writes, too.
  void sync() const;

 private:
  void append(const std::string& text);

  struct Close {
    void operator()(std::FILE* stream) const { std::fclose(stream); }
  };
  std::string path_;
  std::unique_ptr<std::FILE, Close> stream_;
};

/// The text of a progress line, `width` columns at most; what does not fit is left out, the least
/// needed first, SKIPPED never. What has room has the same place in every step, but for a skipped
/// one. The bar takes what room is left. Width 0: a log, so everything, and no bar. Example:
///   step  12/50 ━━━━╸────  task 0.412  kl 0.031  cos −0.21 conflict  634 tok/s  1:42 left
/// `align_label` names the alignment loss (kl or sft).
std::string format_progress(const StepRecord& record, int64_t total_steps,
                            const std::string& align_label, double seconds_left, int width);

/// The progress line: redrawn in place on a terminal; elsewhere one plain line at most every
/// `plain_interval_s`, and also for the last step and for each skipped one. The time left comes
/// from the median of the last 20 steps. Never wider than the terminal, resized or not.
class ProgressLine {
 public:
  /// `stream` is not owned and outlives this object.
  ProgressLine(std::FILE* stream, int64_t total_steps, std::string align_label,
               double plain_interval_s = 10.0);
  void show(const StepRecord& record);
  void finish();  ///< ends the line on a terminal; the next show() begins another

 private:
  void draw(const std::string& text);

  std::FILE* stream_;
  int64_t total_steps_;
  std::string align_label_;
  double plain_interval_s_;
  bool terminal_;
  bool line_open_ = false;
  std::optional<double> last_plain_s_;  // on the steady clock
  std::vector<double> recent_seconds_;
};

/// "0.412", "0.0049", "2.1e-4": two significant digits at least, in six columns for what is
/// positive, below 100 and not below 1e-9; what rounds to 0.000 is zero.
std::string format_loss(double loss);

/// "1:42", "2:03:09"; "?" if it is not finite.
std::string format_duration(double seconds);

}  // namespace safegrad
