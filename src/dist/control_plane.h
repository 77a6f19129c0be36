// control_plane.h: how ranks agree on what happens next.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace safegrad::dist {

/// A fixed set of ranks that exchange small host values, those that steer control flow. All ranks
/// issue the same calls in the same order; every call blocks. A failure throws CommError with rank,
/// operation and the backend's text.
class ControlPlane {
 public:
  virtual ~ControlPlane() = default;
  virtual int rank() const = 0;  ///< [0, size())
  virtual int size() const = 0;
  /// What the next collectives are about (a unit, a step), or what the parts of the next split are;
  /// for whoever keeps a record of them.
  virtual void about(std::string_view) {}

  /// The words of all ranks, in rank order [size() * words.size()]. Whoever sums them in rank order
  /// gets the same bits everywhere.
  virtual std::vector<uint64_t> all_gather_words(std::span<const uint64_t> words) = 0;
  /// text of rank `root` on every rank.
  virtual std::string broadcast(const std::string& text, int root) = 0;
  virtual void barrier() = 0;
  /// The ranks with the same colour, ordered by rank.
  virtual std::unique_ptr<ControlPlane> split_control(int colour) = 0;
};

/// all_gather_words for doubles, bit by bit.
std::vector<double> all_gather_doubles(ControlPlane& control, std::span<const double> values);

/// The texts of all ranks, in rank order.
std::vector<std::string> all_gather_text(ControlPlane& control, const std::string& text);

/// Runs `work` on every rank. Where it throws on any, JobFailed leaves on every rank: with the
/// error's text on the lowest failing rank, without on the others. For checks that can fail on one
/// rank alone: no rank goes on to a collective that another never enters.
void agree(ControlPlane& control, const std::function<void()>& work);

/// Returns when `busy` is false on every rank. The ranks tell each other about once a second, so
/// that no collective takes long however long they are busy.
void await_all(ControlPlane& control, const std::function<bool()>& busy);

/// As agree, for work that may take longer than a collective may: it runs on a thread of its own
/// while the ranks await_all of them. It uses neither ranks nor a GPU.
void agree_patiently(ControlPlane& control, const std::function<void()>& work);

}  // namespace safegrad::dist
