// flight_test.cpp: records of collectives, and what they say together.
#include <array>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <future>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/files.h"
#include "dist/flight_record.h"
#include "dist/flight_report.h"
#include "dist/solo_communicator.h"
#include "dist/watchdog.h"
#include "dist/watched_communicator.h"
#include "unit/temp_folder.h"

namespace safegrad::dist {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

Flight call(const std::string& group, int64_t group_number, const std::string& operation,
            int64_t bytes = 8, const std::string& subject = "") {
  Flight flight;
  flight.group = group;
  flight.group_number = group_number;
  flight.operation = operation;
  flight.subject = subject;
  flight.bytes = bytes;
  return flight;
}

// A rank that has called these in turn, one second each, and waits in the last; or computes.
FlightLog log_of(int rank, int ranks, std::vector<Flight> flights, bool waits = true) {
  FlightLog log;
  log.rank = rank;
  log.ranks = ranks;
  for (size_t i = 0; i < flights.size(); ++i) {
    flights[i].number = static_cast<int64_t>(i) + 1;
    flights[i].started = 1000.0 + static_cast<double>(i);
    flights[i].finished = flights[i].started + 1;
    flights[i].state = Flight::State::finished;
  }
  if (waits) {
    flights.back().finished = 0;
    flights.back().state = Flight::State::awaited;
    log.awaited = flights.back().number;
  }
  for (const Flight& flight : flights) log.groups[flight.group] = flight.group_number;
  log.flights = std::move(flights);
  log.written = 1100;
  return log;
}

TEST(FlightRecord, KeepsTheLastOnesInOrder) {
  FlightRecord record;
  const int64_t calls = static_cast<int64_t>(FlightRecord::kKept) + 44;
  for (int64_t i = 1; i <= calls; ++i) record.finish(record.begin(call("world", i, "barrier")));
  const auto kept = record.recent();
  ASSERT_EQ(kept.size(), FlightRecord::kKept);
  for (size_t i = 0; i < kept.size(); ++i) {
    EXPECT_EQ(kept[i].number, static_cast<int64_t>(i) + 45);
    EXPECT_EQ(kept[i].group_number, kept[i].number);
    EXPECT_EQ(kept[i].state, Flight::State::finished);
  }
}

TEST(FlightRecord, KnowsTheOutermostOneThatHoldsTheRankUp) {
  FlightRecord record;
  EXPECT_FALSE(record.now().awaited.has_value());
  const int64_t gather = record.begin(call("shards", 1, "all_gather"));
  EXPECT_FALSE(record.now().awaited.has_value()) << "under way is not held up";
  record.await(gather);
  const int64_t inner = record.begin(call("control", 1, "barrier"));
  record.await(inner);
  EXPECT_EQ(record.now().awaited, gather);
  EXPECT_EQ(record.now().last, inner);
  record.finish(inner);
  EXPECT_EQ(record.now().awaited, gather);
  record.finish(gather);
  EXPECT_FALSE(record.now().awaited.has_value());
}

TEST(FlightRecord, IsReadWhileItIsWritten) {
  FlightRecord record;
  std::atomic<bool> done = false, reads = false;
  std::thread reader([&] {
    while (!done) {
      int64_t last = 0;
      for (const Flight& flight : record.recent()) {
        EXPECT_GT(flight.number, last);
        EXPECT_EQ(flight.subject, std::to_string(flight.group_number));
        last = flight.number;
      }
      record.now();
      reads = true;
    }
  });
  while (!reads) std::this_thread::yield();
  for (int64_t i = 1; i <= 20000; ++i) {
    const int64_t number = record.begin(call("world", i, "barrier", 0, std::to_string(i)));
    record.await(number);
    record.finish(number);
  }
  done = true;
  reader.join();
}

TEST(WatchedCommunicator, EntersEveryCollective) {
  FlightRecord record;
  auto world =
      watch(std::unique_ptr<Communicator>(std::make_unique<SoloCommunicator>()), record, "world");
  world->about("shard group");
  auto part = world->split(0);
  world->about("step 7");
  world->barrier();
  const at::Tensor t = at::ones({3});
  part->about("block 2");
  auto work = part->all_gather(t, t);
  EXPECT_FALSE(record.now().awaited.has_value());
  EXPECT_EQ(record.recent().back().state, Flight::State::started);
  work->wait();
  EXPECT_EQ(record.recent().back().state, Flight::State::finished);
  part->all_gather_scalars(at::ones({2}, at::kDouble));

  const auto flights = record.recent();
  std::vector<std::string> texts;
  for (const Flight& f : flights) {
    texts.push_back(
        fmt::format("{} {} {} ({}) {}", f.group, f.group_number, f.operation, f.subject, f.bytes));
  }
  EXPECT_THAT(texts,
              ::testing::ElementsAre("world 1 split (shard group) -1", "world 2 barrier (step 7) 0",
                                     "shard group 0 1 all_gather (block 2) 12",
                                     "shard group 0 2 all_gather of scalars (block 2) 16"));
  EXPECT_EQ(part->traffic().at("all_gather").calls, 1) << "traffic is counted beneath";
}

TEST(WatchedCommunicator, OneThatFailedHasNotFinished) {
  FlightRecord record;
  auto world =
      watch(std::unique_ptr<Communicator>(std::make_unique<SoloCommunicator>()), record, "world");
  EXPECT_THROW(world->all_gather(at::ones({3}), at::ones({2}))->wait(), UsageError);
  EXPECT_EQ(record.recent().back().state, Flight::State::awaited);
}

TEST(FlightReport, RoundTrips) {
  const FlightLog log = log_of(
      2, 4, {call("world", 1, "barrier", 0, "step \"1\""), call("world", 2, "broadcast", -1)});
  const FlightLog read = parse_flight_log(to_json(log), "here");
  EXPECT_EQ(to_json(read), to_json(log));
  EXPECT_EQ(read.awaited, 2);
  EXPECT_EQ(read.groups, (std::map<std::string, int64_t>{{"world", 2}}));
  EXPECT_EQ(read.flights[1].bytes, -1);
}

TEST(FlightReport, RefusesWhatIsNoRecord) {
  const std::string good = to_json(log_of(0, 2, {call("world", 1, "barrier")}));
  for (const std::string& bad :
       {std::string("{}"), std::string("[]"), good.substr(0, good.size() / 2),
        std::string(R"({"rank": "0"})")}) {
    EXPECT_THROW(parse_flight_log(bad, "here"), InputError) << bad;
  }
}

TEST(FlightReport, NamesRanksThatLeftNothingAndWhereTheyRun) {
  const std::string report = explain_standstill(
      {log_of(0, 4, {call("world", 9, "barrier")}), log_of(3, 4, {call("world", 9, "barrier")})},
      {"a", "b, process 7", "c, process 8", "d"});
  EXPECT_THAT(report, StartsWith("ranks 1, 2 (b, process 7; c, process 8) give no sign of life"));
  EXPECT_THAT(report, HasSubstr("ranks 0, 3: in barrier 9 of world for 100 s"));
  EXPECT_THAT(report, HasSubstr("ranks 1, 2: no flight record"));
}

TEST(FlightReport, NamesRanksThatAreBehindInTheGroup) {
  const std::vector<Flight> early = {call("world", 8, "barrier"),
                                     call("shards 1", 5, "all_gather")};
  std::vector<Flight> late = early;
  late.push_back(call("world", 9, "all_gather of scalars", 8, "step 3"));
  FlightLog slower = log_of(1, 3, late);
  slower.written += 2;
  const std::string report =
      explain_standstill({log_of(2, 3, early, false), slower, log_of(0, 3, late)}, {});
  EXPECT_THAT(report,
              StartsWith("rank 2 has not come to all_gather of scalars 9 of world (step 3)"));
  EXPECT_THAT(
      report,
      HasSubstr("ranks 0, 1: in all_gather of scalars 9 of world (step 3) for 98 to 100 s"));
  EXPECT_THAT(report, HasSubstr("rank 2: computing; 98 s ago finished all_gather 5 of shards 1"));
}

// A step of a large model has more collectives than a record holds.
TEST(FlightReport, RemembersGroupsThatTheRecordNoLongerHolds) {
  std::vector<Flight> gathers;
  for (int64_t i = 1; i <= 256; ++i) gathers.push_back(call("shards 0", i, "all_gather"));
  FlightLog busy = log_of(1, 2, gathers, false);
  busy.groups["world"] = 8;
  EXPECT_THAT(explain_standstill({log_of(0, 2, {call("world", 9, "barrier")}), busy}, {}),
              StartsWith("rank 1 has not come to barrier 9 of world"));
}

// 0 waits for 2 in their replica group; 2 waits for 3 in its shard group; 3 is to blame.
TEST(FlightReport, FollowsRanksThatWaitToTheOneThatDoesNot) {
  const FlightLog zero = log_of(0, 4, {call("replicas 0", 4, "all_reduce")});
  const FlightLog one = log_of(1, 4, {call("shards 0", 7, "all_gather")}, false);
  const FlightLog two =
      log_of(2, 4, {call("replicas 0", 3, "all_reduce"), call("shards 1", 7, "all_gather")});
  const FlightLog three = log_of(3, 4, {call("shards 1", 6, "all_gather")}, false);
  EXPECT_THAT(explain_standstill({zero, one, two, three}, {}),
              StartsWith("rank 3 has not come to all_gather 7 of shards 1"));
}

TEST(FlightReport, NamesManyRanksByTheirRange) {
  const std::string report =
      explain_standstill({log_of(0, 1024, {call("world", 9, "barrier")})}, {});
  EXPECT_THAT(report, StartsWith("ranks 1-1023 give no sign of life"));
}

// Ranks that are not in the group at all are not behind in it.
TEST(FlightReport, BlamesNobodyWhereAllOfTheGroupAreThere) {
  const std::vector<Flight> first = {call("shards 0", 5, "all_gather")};
  const std::vector<Flight> second = {call("shards 1", 4, "all_gather")};
  const std::string report =
      explain_standstill({log_of(0, 4, first), log_of(1, 4, first), log_of(2, 4, second, false),
                          log_of(3, 4, second, false)},
                         {});
  EXPECT_THAT(report, StartsWith("all its ranks have come to all_gather 5 of shards 0"));
  EXPECT_THAT(report,
              HasSubstr("ranks 2, 3: computing; 99 s ago finished all_gather 4 of shards 1"));
}

TEST(FlightReport, TellsDifferentCollectivesApart) {
  const FlightLog a = log_of(0, 3, {call("world", 9, "all_reduce", 64, "block 1")});
  const FlightLog same = log_of(1, 3, {call("world", 9, "all_reduce", 64, "block 1")});
  EXPECT_THAT(
      explain_standstill({a, same, log_of(2, 3, {call("world", 9, "all_reduce", 32, "block 1")})},
                         {}),
      StartsWith(
          "the ranks call different collectives: number 9 of world is all_reduce "
          "(block 1) of 32 bytes on rank 2, all_reduce (block 1) of 64 bytes on ranks 0, 1"));
  EXPECT_THAT(explain_standstill({a, same, log_of(2, 3, {call("world", 9, "barrier", 0)})}, {}),
              HasSubstr("barrier of 0 bytes on rank 2"));
  EXPECT_THAT(explain_standstill(
                  {a, same, log_of(2, 3, {call("world", 9, "all_reduce", -1, "block 1")})}, {}),
              Not(HasSubstr("different")));
}

// Two ranks as threads: one waits for the other, which computes.
TEST(Watchdog, LeavesTheRecordsOfAllRanksAndOneReport) {
  const test::TempFolder parent;
  Guard guard;
  guard.ranks = 2;
  guard.deadline = std::chrono::seconds(1);
  guard.deadline_name = "the test's deadline";
  guard.folder = parent.path() + "/flight";
  std::array<std::promise<void>, 2> ended;
  std::array<std::unique_ptr<Watchdog>, 2> dogs;
  ::testing::internal::CaptureStderr();
  for (size_t rank = 0; rank < 2; ++rank) {
    dogs[rank] = std::make_unique<Watchdog>([&ended, rank] { ended[rank].set_value(); });
    guard.rank = static_cast<int>(rank);
    dogs[rank]->guard(guard);
    FlightRecord& record = dogs[rank]->record();
    record.finish(record.begin(call("world", 1, "barrier")));
  }
  FlightRecord& waiting = dogs[0]->record();
  waiting.await(waiting.begin(call("world", 2, "barrier")));
  for (std::promise<void>& end : ended) end.get_future().wait();
  const std::string told = ::testing::internal::GetCapturedStderr();

  EXPECT_THAT(told,
              StartsWith("error: no progress for 1 s (the test's deadline): rank 1 has not come "
                         "to barrier 2 of world\n"));
  EXPECT_EQ(told.find("error: ", 1), std::string::npos) << "one rank speaks";
  EXPECT_EQ("error: " + read_small_file(guard.folder + "/report.txt", 1 << 16) + "\n", told);
  for (int rank = 0; rank < 2; ++rank) {
    const std::string path = fmt::format("{}/rank-{}.json", guard.folder, rank);
    const FlightLog log = parse_flight_log(read_small_file(path, 1 << 20), path);
    EXPECT_EQ(log.rank, rank);
    EXPECT_EQ(log.awaited.has_value(), rank == 0);
    EXPECT_EQ(log.flights.size(), rank == 0 ? 2u : 1u);
  }
}

// One rank alone, too: nobody else would miss it.
TEST(Watchdog, EndsAJobWhoseDiskDoesNotAnswer) {
  Guard guard;
  guard.deadline = std::chrono::seconds(1);
  guard.deadline_name = "the test's deadline";
  guard.places = {"node7, process 4711"};
  std::promise<void> ended;
  Watchdog dog([&ended] { ended.set_value(); });
  dog.guard(guard);
  ::testing::internal::CaptureStderr();
  dog.files().beat("writing out/shard");
  ended.get_future().wait();
  const std::string told = ::testing::internal::GetCapturedStderr();

  EXPECT_THAT(told, StartsWith("error: no progress for 1 s (the test's deadline): rank 0 (node7, "
                               "process 4711) is still writing out/shard: the disk or file system "
                               "does not answer"));
}

TEST(Watchdog, LeavesADiskAloneThatIsSlowOrHasNothingToDo) {
  bool ended = false;
  {
    Watchdog dog([&ended] { ended = true; });
    dog.guard({0, 1, std::chrono::seconds(2), "", ""});
    // Longer than the deadline in all, piece by piece; then for longer than it at rest.
    for (int piece = 0; piece < 60; ++piece) {
      dog.files().beat("writing out/shard");
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    dog.files().rest();
    std::this_thread::sleep_for(std::chrono::seconds(3));
  }
  EXPECT_FALSE(ended);
}

TEST(Watchdog, LeavesRanksAloneThatGetOn) {
  const test::TempFolder parent;
  bool ended = false;
  {
    Watchdog dog([&ended] { ended = true; });
    dog.guard({0, 2, std::chrono::seconds(2), "", parent.path() + "/flight"});
    // Many short waits, longer than the deadline in all.
    for (int64_t i = 1; i <= 60; ++i) {
      const int64_t number = dog.record().begin(call("world", i, "barrier"));
      dog.record().await(number);
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      dog.record().finish(number);
    }
  }
  EXPECT_FALSE(ended);
  EXPECT_FALSE(std::filesystem::exists(parent.path() + "/flight"));
}

}  // namespace
}  // namespace safegrad::dist
