// store_control_test.cpp: ranks as threads of one process that meet at a store, and what the
// environment says about such ranks.
#include "dist/store_control.h"

#include <atomic>
#include <functional>
#include <map>
#include <thread>

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "core/error.h"
#include "dist/job_failed.h"
#include "dist/launcher.h"
#include "dist/local_rank.h"
#include "dist/solo_communicator.h"
#include "dist/start_agreement.h"

namespace safegrad::testing {
namespace {

using namespace std::chrono_literals;
using dist::ControlPlane;
using Words = std::vector<uint64_t>;

constexpr auto kLong = 60s;  // never reached by a test that passes

using StoreOf = std::function<c10::intrusive_ptr<c10d::Store>()>;

// Runs `body` on a thread for each of the first `present` of `size` ranks; `store` makes a rank's
// client. What a rank throws is its text.
std::map<int, std::string> run_ranks(int size, int present, std::chrono::milliseconds deadline,
                                     const std::function<void(ControlPlane&)>& body,
                                     const StoreOf& store) {
  std::vector<std::string> failures(static_cast<size_t>(size));
  std::vector<std::thread> threads;
  for (int r = 0; r < present; ++r) {
    threads.emplace_back([&, r] {
      try {
        const auto control = dist::make_store_control({store(), "test/world", r, size}, deadline);
        body(*control);
      } catch (const std::exception& e) {
        failures[static_cast<size_t>(r)] = e.what();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  std::map<int, std::string> told;
  for (int r = 0; r < present; ++r) {
    if (const auto& text = failures[static_cast<size_t>(r)]; !text.empty()) told[r] = text;
  }
  return told;
}

std::map<int, std::string> run_ranks(int size, int present, std::chrono::milliseconds deadline,
                                     const std::function<void(ControlPlane&)>& body) {
  const auto shared = c10::make_intrusive<c10d::HashStore>();
  return run_ranks(size, present, deadline, body, [&] { return shared; });
}

class StoreControlOf : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, StoreControlOf, ::testing::Values(1, 2, 3, 4));

TEST_P(StoreControlOf, WordsArriveInRankOrderExchangeAfterExchange) {
  const auto failures = run_ranks(GetParam(), GetParam(), kLong, [](ControlPlane& control) {
    for (uint64_t round = 0; round < 50; ++round) {
      const uint64_t own[] = {100 * static_cast<uint64_t>(control.rank()) + round, ~round};
      Words expected;
      for (int r = 0; r < control.size(); ++r) {
        expected.push_back(100 * static_cast<uint64_t>(r) + round);
        expected.push_back(~round);
      }
      EXPECT_EQ(control.all_gather_words(own), expected);
    }
    EXPECT_EQ(control.all_gather_words({}), Words());
  });
  EXPECT_TRUE(failures.empty()) << failures.begin()->second;
}

TEST_P(StoreControlOf, EveryRootIsHeardWithAnyBytes) {
  const auto failures = run_ranks(GetParam(), GetParam(), kLong, [](ControlPlane& control) {
    for (int root = 0; root < control.size(); ++root) {
      for (const std::string& text :
           {std::string(), std::string("a\0b\xff", 4), std::string(100'000, 'x')}) {
        const std::string own = control.rank() == root ? text : "not this";
        EXPECT_EQ(control.broadcast(own, root), text);
      }
    }
  });
  EXPECT_TRUE(failures.empty()) << failures.begin()->second;
}

TEST_P(StoreControlOf, ABarrierLetsNobodyThroughBeforeTheLast) {
  std::atomic<int> arrived = 0;
  const auto failures = run_ranks(GetParam(), GetParam(), kLong, [&](ControlPlane& control) {
    for (int round = 1; round <= 20; ++round) {
      ++arrived;
      control.barrier();
      EXPECT_GE(arrived, round * control.size());
    }
  });
  EXPECT_TRUE(failures.empty()) << failures.begin()->second;
}

TEST_P(StoreControlOf, GroupsOfOneColourAreOrderedByRankAndApart) {
  const auto failures = run_ranks(GetParam(), GetParam(), kLong, [](ControlPlane& control) {
    const int colour = control.rank() % 2;
    const auto first = control.split_control(colour);
    const auto second = control.split_control(colour);
    Words expected;
    for (int r = colour; r < control.size(); r += 2) expected.push_back(static_cast<uint64_t>(r));
    EXPECT_EQ(first->rank(), control.rank() / 2);
    EXPECT_EQ(first->size(), static_cast<int>(expected.size()));
    const uint64_t own = static_cast<uint64_t>(control.rank());
    const uint64_t other = own + 10;
    // Neither the other colour, nor the second split, nor the world is mixed up with the first.
    EXPECT_EQ(first->all_gather_words(std::span(&own, 1)), expected);
    for (auto& word : expected) word += 10;
    EXPECT_EQ(second->all_gather_words(std::span(&other, 1)), expected);
    EXPECT_EQ(control.all_gather_words(std::span(&own, 1)).size(),
              static_cast<size_t>(control.size()));
  });
  EXPECT_TRUE(failures.empty()) << failures.begin()->second;
}

TEST_P(StoreControlOf, AnErrorOfOneRankEndsAll) {
  std::atomic<int> failed = 0;
  const auto failures = run_ranks(GetParam(), GetParam(), kLong, [&](ControlPlane& control) {
    try {
      dist::agree(control, [&] {
        if (control.rank() == control.size() - 1) throw InputError("a file is missing");
      });
    } catch (const dist::JobFailed& e) {
      ++failed;
      EXPECT_EQ(e.exit_code(), 1);
      EXPECT_STREQ(e.what(), control.rank() == control.size() - 1 ? "a file is missing" : "");
    }
  });
  EXPECT_TRUE(failures.empty()) << failures.begin()->second;
  EXPECT_EQ(failed, GetParam());
}

// A port that the system chose; each client has a connection of its own.
c10::intrusive_ptr<c10d::TCPStore> tcp_store(uint16_t port, bool server) {
  c10d::TCPStoreOptions options;
  options.port = port;
  options.isServer = server;
  options.waitWorkers = false;
  return c10::make_intrusive<c10d::TCPStore>("127.0.0.1", options);
}

TEST(StoreControl, WorksOverTcp) {
  const auto server = tcp_store(0, true);
  const auto failures = run_ranks(
      3, 3, kLong,
      [](ControlPlane& control) {
        for (int root = 0; root < 3; ++root) {
          const std::string own = fmt::format("from {}", control.rank());
          EXPECT_EQ(control.broadcast(own, root), fmt::format("from {}", root));
        }
        control.barrier();
        const auto part = control.split_control(control.rank() == 1);
        const uint64_t word = static_cast<uint64_t>(control.rank());
        EXPECT_EQ(part->all_gather_words(std::span(&word, 1)),
                  control.rank() == 1 ? Words{1} : (Words{0, 2}));
      },
      [&] { return tcp_store(server->getPort(), false); });
  EXPECT_TRUE(failures.empty()) << failures.begin()->second;
}

TEST(StoreControlFailure, AMissingRankIsNamedOverTcp) {
  const auto server = tcp_store(0, true);
  const auto failures = run_ranks(
      3, 2, 500ms, [](ControlPlane& control) { control.barrier(); },
      [&] { return tcp_store(server->getPort(), false); });

  ASSERT_EQ(failures.size(), 2u);
  for (const auto& [rank, text] : failures)
    EXPECT_NE(text.find("rank 2 did not arrive within 0.5 s"), std::string::npos) << text;
}

TEST(StoreControlFailure, TheRankThatDoesNotArriveIsNamedByAllOthers) {
  const auto failures = run_ranks(3, 2, 500ms, [](ControlPlane& control) { control.barrier(); });

  ASSERT_EQ(failures.size(), 2u);
  for (const auto& [rank, text] : failures) {
    EXPECT_EQ(text,
              fmt::format("rank {} of 3: barrier (exchange 1 of group test/world): rank 2 did "
                          "not arrive within 0.5 s",
                          rank));
  }
}

TEST(StoreControlFailure, ARankThatStopsLaterIsNamedWithItsExchange) {
  const auto failures = run_ranks(2, 2, 500ms, [](ControlPlane& control) {
    control.barrier();
    if (control.rank() == 0) control.broadcast("only rank 0 is here", 0);
  });

  ASSERT_EQ(failures.size(), 1u);
  EXPECT_NE(failures.at(0).find("broadcast (exchange 2 of group test/world): rank 1 did not"),
            std::string::npos)
      << failures.at(0);
}

TEST(StoreControlFailure, RanksInDifferentPlacesOfTheProgramAreToldSo) {
  const auto failures = run_ranks(2, 2, kLong, [](ControlPlane& control) {
    const uint64_t own[] = {1, 2};
    control.all_gather_words(std::span(own).first(control.rank() == 0 ? 1 : 2));
  });

  ASSERT_EQ(failures.size(), 2u);
  EXPECT_NE(failures.at(0).find("24 bytes together, 16 were due"), std::string::npos)
      << failures.at(0);
}

TEST(StoreControlKeys, AreForgottenWhenAllRanksHaveReadThem) {
  const auto store = c10::make_intrusive<c10d::HashStore>();
  std::vector<std::thread> threads;
  for (int r = 0; r < 2; ++r) {
    threads.emplace_back([&, r] {
      const auto control = dist::make_store_control({store, "test", r, 2}, kLong);
      for (int round = 0; round < 100; ++round) control->barrier();
    });
  }
  for (auto& thread : threads) thread.join();

  EXPECT_EQ(store->getNumKeys(), 3) << "two parts and the whole of the last exchange";
}

dist::Environment environment(std::map<std::string, std::string> variables) {
  return [variables](const char* name) {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  };
}

const std::map<std::string, std::string> kTorchrun = {
    {"RANK", "3"}, {"WORLD_SIZE", "4"}, {"MASTER_ADDR", "node-1"}, {"MASTER_PORT", "29500"}};

std::map<std::string, std::string> with(std::map<std::string, std::string> variables,
                                        const std::map<std::string, std::string>& more) {
  variables.insert(more.begin(), more.end());
  return variables;
}

TEST(StoreJob, IsReadFromTorchrunsVariables) {
  const auto own = dist::find_store_job(environment(kTorchrun));
  const auto agent = dist::find_store_job(environment(with(
      kTorchrun, {{"TORCHELASTIC_USE_AGENT_STORE", "True"}, {"TORCHELASTIC_RESTART_COUNT", "2"}})));

  ASSERT_TRUE(own && agent);
  EXPECT_EQ(own->rank, 3);
  EXPECT_EQ(own->size, 4);
  EXPECT_EQ(own->host, "node-1");
  EXPECT_EQ(own->port, 29500);
  EXPECT_FALSE(own->hosted_by_agent);
  EXPECT_EQ(own->attempt, 0);
  EXPECT_TRUE(agent->hosted_by_agent);
  EXPECT_EQ(agent->attempt, 2);
}

TEST(StoreJob, IsReadFromSlurmsStepWithAnAddress) {
  const std::map<std::string, std::string> address = {{"MASTER_ADDR", "node-1"},
                                                      {"MASTER_PORT", "29500"}};
  const std::map<std::string, std::string> step = {{"SLURM_PROCID", "5"},
                                                   {"SLURM_STEP_NUM_TASKS", "8"}};
  const auto job = dist::find_store_job(environment(with(address, step)));

  ASSERT_TRUE(job);
  EXPECT_EQ(job->rank, 5);
  EXPECT_EQ(job->size, 8);
  EXPECT_FALSE(dist::find_store_job(environment(step))) << "no address: MPI";
  EXPECT_FALSE(dist::find_store_job(environment({}))) << "nothing: MPI, one rank";
}

TEST(StoreJob, GivesWayToMpi) {
  EXPECT_FALSE(dist::find_store_job(environment(with(kTorchrun, {{"PMIX_RANK", "0"}}))));
  EXPECT_FALSE(dist::find_store_job(environment(with(kTorchrun, {{"OMPI_COMM_WORLD_SIZE", "2"}}))));
}

std::string refusal(const std::map<std::string, std::string>& variables) {
  try {
    dist::find_store_job(environment(variables));
  } catch (const InputError& e) {
    return e.what();
  }
  return "not refused";
}

TEST(StoreJob, HalfOfTheVariablesIsRefusedByTheirNames) {
  for (const auto& [name, value] : kTorchrun) {
    auto rest = kTorchrun;
    rest.erase(name);
    EXPECT_NE(refusal(rest).find("but not " + name + ":"), std::string::npos) << refusal(rest);
  }
  const std::string slurm =
      refusal({{"SLURM_PROCID", "0"}, {"SLURM_STEP_NUM_TASKS", "2"}, {"MASTER_ADDR", "node-1"}});
  EXPECT_NE(slurm.find("has MASTER_ADDR, but not MASTER_PORT:"), std::string::npos) << slurm;
}

TEST(StoreJob, NumbersOutOfRangeAreRefusedWithBothSides) {
  const std::pair<const char*, const char*> mistakes[] = {{"RANK", "4"},
                                                          {"RANK", "-1"},
                                                          {"WORLD_SIZE", "0"},
                                                          {"WORLD_SIZE", "4x"},
                                                          {"MASTER_PORT", "65536"}};
  for (const auto& [name, value] : mistakes) {
    auto variables = kTorchrun;
    variables[name] = value;
    EXPECT_NE(
        refusal(variables).find(fmt::format("variable {}: got \"{}\"; allowed: ", name, value)),
        std::string::npos)
        << refusal(variables);
  }
  EXPECT_NE(refusal(with({{"RANK", "4"}, {"WORLD_SIZE", "4"}}, kTorchrun)).find("allowed: 0 to 3"),
            std::string::npos);
}

// What check_promised_ranks says about a world of one; empty: nothing.
std::string complaint(const std::map<std::string, std::string>& variables, int found = 1) {
  try {
    dist::check_promised_ranks(found, environment(variables), "start it otherwise");
  } catch (const InputError& e) {
    return e.what();
  }
  return "";
}

TEST(PromisedRanks, AWorldOfOneThatSomebodyStartedAsManyIsRefused) {
  for (const char* name :
       {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"}) {
    EXPECT_EQ(complaint({{name, "4"}}),
              fmt::format("4 ranks were started ({}), but this one finds itself alone: they would "
                          "each train by themselves; start it otherwise",
                          name));
    EXPECT_EQ(complaint({{name, "1"}}), "");
    EXPECT_EQ(complaint({{name, "4"}}, 4), "") << "they found each other";
    EXPECT_NE(complaint({{name, "four"}}).find("got \"four\""), std::string::npos);
  }
}

TEST(PromisedRanks, OneProcessInsideAnAllocationIsAlone) {
  EXPECT_EQ(complaint({}), "");
  const std::map<std::string, std::string> batch_script = {
      {"SLURM_JOB_ID", "7"}, {"SLURM_NTASKS", "4"},        {"SLURM_NPROCS", "4"},
      {"SLURM_PROCID", "0"}, {"SLURM_JOB_NUM_NODES", "2"}, {"SLURM_TASKS_PER_NODE", "2(x2)"}};
  EXPECT_EQ(complaint(batch_script), "");
  EXPECT_FALSE(dist::find_store_job(environment(batch_script)));
  // mpirun -n 1 in a step of four tasks: the launcher inside is the one that started this process.
  EXPECT_EQ(complaint({{"OMPI_COMM_WORLD_SIZE", "1"}, {"SLURM_STEP_NUM_TASKS", "4"}}), "");
}

TEST(StartAgreement, ADifferenceIsToldThroughAStore) {
  std::atomic<int> failed = 0;
  const auto failures = run_ranks(3, 3, kLong, [&](ControlPlane& control) {
    std::vector<std::string> warnings;
    dist::check_same_start(control, {{"optimizer.lr", "0.001"}}, warnings);
    try {
      dist::check_same_start(control, {{"optimizer.lr", control.rank() == 1 ? "0.1" : "0.001"}},
                             warnings);
    } catch (const dist::JobFailed& e) {
      ++failed;
      EXPECT_EQ(e.exit_code(), 1);
      const std::string text = e.what();
      if (control.rank() == 0)
        EXPECT_NE(text.find("optimizer.lr: 0.001 on ranks 0, 2; 0.1 on rank 1"), std::string::npos);
      else
        EXPECT_EQ(text, "");
    }
    EXPECT_TRUE(warnings.empty());
  });
  EXPECT_TRUE(failures.empty()) << failures.begin()->second;
  EXPECT_EQ(failed, 3);
}

// The ranks of one attempt, as threads, at the store that an agent holds.
std::vector<std::string> heard_in_attempt(int attempt, uint16_t port) {
  std::vector<std::string> heard(2);
  std::vector<std::thread> threads;
  for (int r = 0; r < 2; ++r) {
    threads.emplace_back([&, r] {
      const auto launcher = dist::make_store_launcher({r, 2, "127.0.0.1", port, true, attempt});
      heard[static_cast<size_t>(r)] =
          launcher->control().broadcast(fmt::format("attempt {}", attempt), 1);
    });
  }
  for (auto& thread : threads) thread.join();
  return heard;
}

TEST(StoreLauncher, AnAgentsStoreServesEveryAttempt) {
  const auto agent = tcp_store(0, true);
  for (int attempt = 0; attempt < 2; ++attempt) {
    const auto heard = heard_in_attempt(attempt, agent->getPort());
    EXPECT_EQ(heard, std::vector<std::string>(2, fmt::format("attempt {}", attempt)))
        << "what an earlier attempt left is not heard";
  }
}

TEST(StoreLauncher, RefusesCpuRanks) {
  const auto agent = tcp_store(0, true);
  const auto launcher = dist::make_store_launcher({0, 1, "127.0.0.1", agent->getPort(), true, 0});
  EXPECT_THROW(launcher->check_cpu(), ConfigError);
  EXPECT_THROW(launcher->connect_cpu(), ConfigError);
}

TEST(LocalRank, RanksOfOneMachineAreCountedInOrder) {
  const auto failures = run_ranks(3, 3, kLong, [](ControlPlane& control) {
    const auto local = dist::find_local_rank(control);
    EXPECT_EQ(local.rank, control.rank());
    EXPECT_EQ(local.ranks, 3);
  });
  EXPECT_TRUE(failures.empty()) << failures.begin()->second;
}

// What each rank answers to its GPUs: its index, or the error's text on the rank that has one.
std::map<int, std::string> choices(const std::vector<std::vector<uint64_t>>& gpus,
                                   int local_ranks) {
  std::map<int, std::string> result;
  std::mutex mutex;
  const auto size = static_cast<int>(gpus.size());
  run_ranks(size, size, kLong, [&](ControlPlane& control) {
    std::string answer;
    try {
      const int index = dist::choose_gpu(control, {control.rank() % local_ranks, local_ranks},
                                         gpus[static_cast<size_t>(control.rank())], "0,1");
      answer = std::to_string(index);
    } catch (const dist::JobFailed& e) {
      answer = e.what();
    }
    const std::scoped_lock lock(mutex);
    result[control.rank()] = answer;
  });
  return result;
}

TEST(ChooseGpu, OfSeveralTheOneOfTheLocalRankAndOfOneThatOne) {
  using Answers = std::map<int, std::string>;
  EXPECT_EQ(choices({{11, 12}, {11, 12}, {21, 22}, {21, 22}}, 2),
            (Answers{{0, "0"}, {1, "1"}, {2, "0"}, {3, "1"}}));
  EXPECT_EQ(choices({{11}, {12}}, 2), (Answers{{0, "0"}, {1, "0"}}));  // --gpus-per-task=1
}

TEST(ChooseGpu, TooFewGpusNoneOrTheSameOneIsRefusedByOneRank) {
  const auto few = choices({{1, 2}, {1, 2}, {1, 2}}, 3);
  EXPECT_NE(few.at(0).find("3 ranks were started on this host but only 2 GPUs"), std::string::npos);
  EXPECT_NE(few.at(0).find("CUDA_VISIBLE_DEVICES is '0,1'"), std::string::npos) << few.at(0);
  EXPECT_EQ(few.at(1) + few.at(2), "");
  const auto none = choices({{1}, {}}, 2);
  EXPECT_NE(none.at(1).find("parallel.device: cuda, but rank 1"), std::string::npos) << none.at(1);
  EXPECT_NE(none.at(1).find("sees no GPU"), std::string::npos);
  const auto same = choices({{5}, {5}}, 2);
  EXPECT_NE(same.at(1).find("ranks 0 and 1 would use the same GPU"), std::string::npos)
      << same.at(1);
}

TEST(SoloCommunicator, CollectivesOfOneRankAreCopies) {
  dist::SoloCommunicator one;
  const at::Tensor shard = at::arange(5, at::kFloat), full = at::empty({5}, at::kFloat);
  one.all_gather(full, shard)->wait();
  EXPECT_TRUE(full.equal(shard));
  const at::Tensor sum = at::empty({5}, at::kFloat);
  one.reduce_scatter(sum, full)->wait();
  EXPECT_TRUE(sum.equal(shard));
  EXPECT_EQ(one.all_gather_scalars(at::full({2}, 0.5, at::kDouble)), std::vector<double>(2, 0.5));
  const auto memory = one.allocate_shards(4, at::kFloat);
  EXPECT_EQ(memory.own.data_ptr(), memory.all.data_ptr()) << "what is gathered is in place";
  EXPECT_THROW(one.all_gather(at::empty({4}), shard), UsageError);
}

}  // namespace
}  // namespace safegrad::testing
