#include "core/metrics.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <sstream>

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <sys/ioctl.h>
#include <unistd.h>

#include "core/error.h"
#include "unit/temp_folder.h"

namespace safegrad {
namespace {

StepRecord typical() {
  StepRecord record;
  record.step = 12;
  record.epoch = 0.24;
  record.loss_task = 0.4123;
  record.loss_align = 0.0312;
  record.uu = 1.0 / 3;
  record.ua = -0.1;
  record.aa = 0.7;
  record.cosine = -0.2071;
  record.conflict = true;
  record.c_align = 1.0 + 0.1 / 0.7;
  record.grad_norm = 2.5;
  record.clip = 0.4;
  record.lr = 1e-5;
  record.task_tokens = 900;
  record.align_tokens = 300;
  record.seconds = 2.7;
  record.tokens_per_s = 634.2;
  record.speed_of_light = 0.718;
  record.memory_bytes = int64_t{3} << 30;
  return record;
}

std::vector<std::string> keys_of(const std::string& line) {
  const auto json = nlohmann::ordered_json::parse(line);
  std::vector<std::string> keys;
  for (const auto& [key, value] : json.items()) keys.push_back(key);
  return keys;
}

/// Columns of text whose characters are all one column wide.
int columns(const std::string& text) {
  int count = 0;
  for (const char c : text) count += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  return count;
}

/// Runs `body` on a stream that is no terminal and returns what it printed.
template <class Body>
std::string printed_to_log(Body body) {
  char* text = nullptr;
  size_t size = 0;
  std::FILE* stream = open_memstream(&text, &size);
  body(stream);
  std::fclose(stream);
  std::string printed(text, size);
  std::free(text);
  return printed;
}

TEST(StepRecordJson, KeysComeInTheDocumentedOrder) {
  StepRecord record = typical();
  record.probe["refusal"] = {{"comply", 0.25}, {"refuse", 0.75}};
  record.phase_seconds = {{"forward", 1.5}};
  record.align_renewed = false;
  record.gated = 2;
  record.block_coefficients = BlockCoefficients{{1, 1}, {0.5, 2}, 3};
  record.drift = 0.5;
  record.c_drift = 1;
  record.blocks["block.0"] = {{"aa", 1}, {"ua", 2}, {"uu", 3}};

  const std::vector<std::string> keys = keys_of(to_json_line(record));

  EXPECT_EQ(
      fmt::format("{}", fmt::join(keys, " ")),
      "step epoch loss_task loss_align align_renewed gated uu ua aa cosine conflict c_task c_align "
      "drift c_drift block_coefficients grad_norm clip lr task_tokens align_tokens seconds "
      "tokens_per_s flops speed_of_light memory_bytes skipped probe phase_seconds blocks");
}

TEST(StepRecordJson, CoefficientsOfBlocksAreARange) {
  StepRecord record = typical();
  record.block_coefficients = BlockCoefficients{{1, 1}, {0.5, 2}, 3};
  EXPECT_EQ(nlohmann::ordered_json::parse(to_json_line(record))["block_coefficients"].dump(),
            R"({"c_task":[1.0,1.0],"c_align":[0.5,2.0],"conflicts":3})");
}

TEST(StepRecordJson, WhatWentWrongIsSaidInFull) {
  StepRecord record = typical();
  record.skipped = true;
  record.not_finite = NotFinite{{{"task", {1}}},
                                {{"layers.10", {"task"}}, {"layers.9", {"task", "align"}}},
                                {{"task", {3, 7}}}};
  const auto skipped = nlohmann::ordered_json::parse(to_json_line(record));
  record = typical();
  record.loss_spike = LossSpike{1.25, 2.5, {4, 9}};
  const auto spike = nlohmann::ordered_json::parse(to_json_line(record));

  EXPECT_EQ(skipped["not_finite"].dump(),
            R"({"losses":{"task":[1]},"blocks":{"layers.10":["task"],"layers.9":["task","align"]},)"
            R"("samples":{"task":[3,7]}})");
  EXPECT_FALSE(skipped.contains("loss_spike"));
  EXPECT_EQ(spike["loss_spike"].dump(), R"({"median":1.25,"limit":2.5,"samples":[4,9]})");
  EXPECT_FALSE(spike.contains("not_finite"));
}

TEST(StepRecordJson, OneObjectiveLeavesOutAlignmentAndEmptyMaps) {
  StepRecord record;
  record.step = 1;

  const std::vector<std::string> keys = keys_of(to_json_line(record));

  EXPECT_EQ(keys, (std::vector<std::string>{"step", "epoch", "loss_task", "uu", "conflict",
                                            "c_task", "grad_norm", "clip", "lr", "task_tokens",
                                            "align_tokens", "seconds", "tokens_per_s", "flops",
                                            "speed_of_light", "skipped"}));
}

TEST(StepRecordJson, ValuesReadBackToTheSameBits) {
  StepRecord record = typical();
  record.grad_norm = std::nextafter(1.0, 2.0);
  record.aa = std::numeric_limits<double>::denorm_min();
  record.task_tokens = (int64_t{1} << 53) + 1;  // no double holds this
  record.probe["refusal"]["refuse"] = 2.0 / 3;

  const std::string line = to_json_line(record);
  const auto json = nlohmann::json::parse(line);

  EXPECT_EQ(line.find('\n'), std::string::npos);
  EXPECT_EQ(json["uu"].get<double>(), 1.0 / 3);
  EXPECT_EQ(json["ua"].get<double>(), -0.1);
  EXPECT_EQ(json["grad_norm"].get<double>(), std::nextafter(1.0, 2.0));
  EXPECT_EQ(json["aa"].get<double>(), std::numeric_limits<double>::denorm_min());
  EXPECT_EQ(json["task_tokens"].get<int64_t>(), (int64_t{1} << 53) + 1);
  EXPECT_EQ(json["probe"]["refusal"]["refuse"].get<double>(), 2.0 / 3);
  EXPECT_EQ(json["memory_bytes"].get<int64_t>(), int64_t{3} << 30);
  EXPECT_EQ(json["conflict"], true);
  EXPECT_EQ(json["skipped"], false);
}

TEST(StepRecordJson, NanAndInfinityBecomeNull) {
  StepRecord record = typical();
  record.loss_task = std::nan("");
  record.aa = std::numeric_limits<double>::infinity();
  record.skipped = true;

  const auto json = nlohmann::json::parse(to_json_line(record));

  EXPECT_TRUE(json.at("loss_task").is_null());
  EXPECT_TRUE(json.at("aa").is_null());
  EXPECT_EQ(json["skipped"], true);
}

TEST(MetricsFile, AppendsOneLineAStepVisibleAtOnce) {
  const test::TempFolder folder;
  const std::string path = folder / "metrics.jsonl";
  StepRecord record = typical();

  MetricsFile first(path);
  first.write(record);
  const std::string after_one = test::read_text(path);
  record.step = 13;
  MetricsFile resumed(path);
  resumed.write(record);

  EXPECT_EQ(after_one, to_json_line(typical()) + "\n");
  EXPECT_EQ(test::read_text(path), after_one + to_json_line(record) + "\n");
}

TEST(MetricsFile, LineCutShortByACrashSpoilsNoOther) {
  const test::TempFolder folder;
  const std::string path = folder / "metrics.jsonl";
  test::write_text(path, "{\"step\": 1}\n{\"step\": 2, \"ep");

  MetricsFile(path).write(typical());

  EXPECT_EQ(test::read_text(path),
            "{\"step\": 1}\n{\"step\": 2, \"ep\n" + to_json_line(typical()) + "\n");
}

TEST(MetricsFile, RefusesAFolderThatIsNotThere) {
  const test::TempFolder folder;
  const std::string path = folder / "none/metrics.jsonl";

  try {
    MetricsFile file(path);
    FAIL() << "expected a RunError for " << path;
  } catch (const RunError& error) {
    EXPECT_NE(std::string(error.what()).find(path), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("No such file"), std::string::npos) << error.what();
  }
}

TEST(MetricsFile, FullDiskIsAnError) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "no /dev/full on this system";
  MetricsFile file("/dev/full");

  try {
    file.write(typical());
    FAIL() << "expected a RunError";
  } catch (const RunError& error) {
    EXPECT_NE(std::string(error.what()).find("No space left"), std::string::npos) << error.what();
  }
}

TEST(FormatProgress, WideLineShowsEverythingAndABar) {
  const std::string line = format_progress(typical(), 50, "kl", 102, 130);

  EXPECT_EQ(line,
            "step  12/50 ━━━━━─────────────────  task 0.412  kl 0.031   cos −0.21 conflict  "
            "634 tok/s    speed of light 72 %   1:42 left");
}

TEST(FormatProgress, LogLineHasNoBarAndNoLimit) {
  const std::string line = format_progress(typical(), 50, "sft", 102, 0);

  EXPECT_EQ(line,
            "step  12/50  task 0.412  sft 0.031  cos −0.21 conflict  634 tok/s  "
            "speed of light 72 %  1:42 left");
}

TEST(FormatProgress, NarrowLinesDropTheLeastNeededFirst) {
  EXPECT_EQ(format_progress(typical(), 50, "kl", 102, 79),  // a terminal of 80
            "step  12/50  task 0.412  kl 0.031   cos −0.21 conflict  634 tok/s    1:42 left");
  EXPECT_EQ(format_progress(typical(), 50, "kl", 102, 40), "step  12/50  task 0.412  1:42 left");
}

TEST(FormatProgress, WhatIsShownAndWhereIsTheSameInAllSteps) {
  StepRecord other = typical();
  other.step = 3;
  other.cosine = 0.4;
  other.conflict = false;
  other.loss_align = 2.1e-4;
  other.tokens_per_s = 12345;
  other.speed_of_light = 1.0;
  // Columns at which the words begin; the same number of columns in bytes before each would do too.
  const auto places = [](const std::string& line) {
    std::vector<std::pair<std::string, int>> found;
    for (const char* word : {"task", "kl", "cos", "speed"}) {
      const size_t at = line.find(word);
      if (at != std::string::npos) found.emplace_back(word, columns(line.substr(0, at)));
    }
    for (const char* word : {"tok/s", "left"})  // behind a number
      found.emplace_back(word, line.find(word) != std::string::npos);
    return found;
  };

  size_t shapes = 0, before = 0;
  for (int width = 20; width <= 140; ++width) {
    const auto expected = places(format_progress(typical(), 50, "kl", 102, width));
    EXPECT_EQ(places(format_progress(other, 50, "kl", 9, width)), expected) << width;
    EXPECT_EQ(places(format_progress(other, 50, "kl", 3599, width)), expected) << width;
    if (expected.size() != before) ++shapes;
    before = expected.size();
  }
  EXPECT_GE(shapes, 4u) << "widths that leave out more and less were among them";
}

TEST(FormatLoss, SmallLossesKeepTwoDigitsInSixColumns) {
  const std::pair<double, const char*> known[] = {
      {0.412, "0.412"},      {12.3456, "12.346"}, {0.0312, "0.031"},  {0.00996, "0.0100"},
      {0.00487, "0.0049"},   {0.00021, "2.1e-4"}, {3.4e-9, "3.4e-9"}, {0, "0.000"},
      {-0.00021, "-2.1e-4"}, {1e-12, "1.0e-12"}};
  for (const auto& [loss, text] : known) EXPECT_EQ(format_loss(loss), text);
  EXPECT_EQ(format_loss(std::nan("")), "nan");
}

TEST(FormatProgress, OneObjectiveShowsNoAlignment) {
  StepRecord record = typical();
  record.loss_align = record.cosine = record.ua = record.aa = {};
  record.conflict = false;
  record.speed_of_light = 0;

  EXPECT_EQ(format_progress(record, 50, "kl", 102, 0),
            "step  12/50  task 0.412  634 tok/s  1:42 left");
}

TEST(FormatProgress, NeverWiderThanAskedAndSkippedAlwaysSeen) {
  StepRecord record = typical();
  record.skipped = true;
  record.loss_task = std::nan("");

  for (int width = 1; width <= 200; ++width) {
    const std::string line = format_progress(record, 50, "kl", 102, width);

    EXPECT_LE(columns(line), width) << line;
    if (width >= 20) {
      EXPECT_NE(line.find("SKIPPED"), std::string::npos) << width << ": " << line;
    }
  }
}

TEST(FormatProgress, BarFillsInHalfSteps) {
  StepRecord record = typical();
  const auto bar_at = [&record](int64_t step) {
    record.step = step;
    const std::string line = format_progress(record, 44, "kl", 0, 200);
    const size_t begin = line.find("/44 ") + 4;
    return line.substr(begin, line.find("  task") - begin);
  };
  const auto repeat = [](const char* cell, int count) {
    std::string text;
    for (int i = 0; i < count; ++i) text += cell;
    return text;
  };

  EXPECT_EQ(bar_at(0), repeat("─", 22));
  EXPECT_EQ(bar_at(1), "╸" + repeat("─", 21));
  EXPECT_EQ(bar_at(2), "━" + repeat("─", 21));
  EXPECT_EQ(bar_at(43), repeat("━", 21) + "╸");
  EXPECT_EQ(bar_at(44), repeat("━", 22));
}

TEST(ProgressLine, LogHasFirstLastAndSkippedStepsWithinTheInterval) {
  const std::string printed = printed_to_log([](std::FILE* stream) {
    ProgressLine progress(stream, 5, "kl", 1e9);
    StepRecord record = typical();
    for (record.step = 1; record.step <= 5; ++record.step) {
      record.skipped = record.step == 3;
      progress.show(record);
    }
    progress.finish();
  });

  std::istringstream lines(printed);
  std::vector<std::string> heads;
  for (std::string line; std::getline(lines, line);) heads.push_back(line.substr(0, 8));
  EXPECT_EQ(heads, (std::vector<std::string>{"step  1/", "step  3/", "step  5/"}));
  EXPECT_NE(printed.find("step  3/5  SKIPPED"), std::string::npos) << printed;
  EXPECT_EQ(printed.find('\r'), std::string::npos);
  EXPECT_EQ(printed.find('\x1b'), std::string::npos);
}

TEST(ProgressLine, LogHasEveryStepAtIntervalZero) {
  const std::string printed = printed_to_log([](std::FILE* stream) {
    ProgressLine progress(stream, 100, "kl", 0);
    StepRecord record = typical();
    for (record.step = 1; record.step <= 3; ++record.step) progress.show(record);
  });

  EXPECT_EQ(std::count(printed.begin(), printed.end(), '\n'), 3) << printed;
}

TEST(ProgressLine, TimeLeftIsTheMedianOfTheLastTwentySteps) {
  const std::string printed = printed_to_log([](std::FILE* stream) {
    ProgressLine progress(stream, 131, "kl", 0);
    StepRecord record = typical();
    for (record.step = 1; record.step <= 31; ++record.step) {
      // An expensive start that has left the window, and a pause that a mean would follow.
      record.seconds = record.step <= 11 ? 50 : record.step == 30 ? 1000 : 2;
      progress.show(record);
    }
  });

  const std::string last = printed.substr(printed.rfind("step"));
  EXPECT_NE(last.find("  3:20 left"), std::string::npos) << last;  // 100 steps of 2 s
}

TEST(ProgressLine, TerminalIsRedrawnInPlaceWithinItsWidth) {
  const int controller = posix_openpt(O_RDWR | O_NOCTTY);
  if (controller < 0 || grantpt(controller) != 0 || unlockpt(controller) != 0) {
    GTEST_SKIP() << "no pseudo-terminals on this system";
  }
  std::FILE* terminal = std::fopen(ptsname(controller), "w");
  ASSERT_NE(terminal, nullptr);
  winsize size{};
  size.ws_row = 24;
  size.ws_col = 50;
  ASSERT_EQ(ioctl(controller, TIOCSWINSZ, &size), 0);

  setenv("TERM", "dumb", 1);  // who starts ranks under a pseudo-terminal asks for plain lines so
  ProgressLine plain(terminal, 50, "kl");
  plain.show(typical());
  const auto read_line = [&] {  // a terminal hands over what has arrived, not what was written
    std::string text;
    char c = 0;
    while (c != '\n' && read(controller, &c, 1) == 1) text += c;
    return text;
  };
  EXPECT_EQ(read_line().find('\x1b'), std::string::npos);

  setenv("TERM", "xterm", 1);
  ProgressLine progress(terminal, 50, "kl");
  progress.show(typical());
  StepRecord next = typical();
  next.step = 13;
  progress.show(next);
  progress.finish();
  progress.finish();  // the line is ended once
  const std::string printed = read_line();
  std::fclose(terminal);
  close(controller);

  const auto line = [&](const StepRecord& record) {
    const double left = 2.7 * static_cast<double>(50 - record.step);
    return fmt::format("\r{}\x1b[K", format_progress(record, 50, "kl", left, 49));
  };
  EXPECT_EQ(printed, line(typical()) + line(next) + "\r\n");  // the terminal turns \n into \r\n
}

TEST(FormatDuration, MinutesHoursAndNonsense) {
  EXPECT_EQ(format_duration(0), "0:00");
  EXPECT_EQ(format_duration(5.4), "0:05");
  EXPECT_EQ(format_duration(59.6), "1:00");
  EXPECT_EQ(format_duration(102), "1:42");
  EXPECT_EQ(format_duration(7389), "2:03:09");
  EXPECT_EQ(format_duration(360000), "100:00:00");
  EXPECT_EQ(format_duration(-3), "0:00");
  EXPECT_EQ(format_duration(std::nan("")), "?");
  EXPECT_EQ(format_duration(std::numeric_limits<double>::infinity()), "?");
}

}  // namespace
}  // namespace safegrad
