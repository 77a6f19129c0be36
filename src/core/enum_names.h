// enum_names.h: how each enumerator of the config is spelled in YAML and in messages.
#pragma once
#include <cstddef>
#include <span>
#include <string_view>

#include "core/config.h"

namespace safegrad {

using Names = std::span<const std::string_view>;

// In the order of the enumerators, which count from 0.
inline constexpr std::string_view kComputeDtypes[] = {"float32", "bfloat16"};
inline constexpr std::string_view kRules[] = {"sft",  "weighted_sum", "safegrad", "agem", "pcgrad",
                                              "mgda", "cagrad",       "ogpsa",    "lisa"};
inline constexpr std::string_view kAlignLosses[] = {"kl", "sft"};
inline constexpr std::string_view kKlPositions[] = {"response", "all"};
inline constexpr std::string_view kScheduleKinds[] = {"constant", "linear", "cosine"};
inline constexpr std::string_view kDevices[] = {"auto", "cpu", "cuda"};
inline constexpr std::string_view kRecomputes[] = {"none", "block"};
inline constexpr std::string_view kSurgeries[] = {"global", "block"};
inline constexpr std::string_view kGradientModes[] = {"one_pass", "two_pass"};
inline constexpr std::string_view kFrozenWeights[] = {"sharded", "replicated"};

/// Every spelling of the argument's type, in the order of its enumerators.
constexpr Names names_of(ComputeDtype) {
  return kComputeDtypes;
}
constexpr Names names_of(Rule) {
  return kRules;
}
constexpr Names names_of(AlignLoss) {
  return kAlignLosses;
}
constexpr Names names_of(KlPositions) {
  return kKlPositions;
}
constexpr Names names_of(ScheduleKind) {
  return kScheduleKinds;
}
constexpr Names names_of(Device) {
  return kDevices;
}
constexpr Names names_of(Recompute) {
  return kRecomputes;
}
constexpr Names names_of(Surgery) {
  return kSurgeries;
}
constexpr Names names_of(GradientMode) {
  return kGradientModes;
}
constexpr Names names_of(FrozenWeights) {
  return kFrozenWeights;
}

/// The spelling of one enumerator.
template <class Enum>
constexpr std::string_view name_of(Enum value) {
  return names_of(value)[static_cast<size_t>(value)];
}

}  // namespace safegrad
