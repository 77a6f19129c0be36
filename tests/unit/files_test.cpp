#include "core/files.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/json.h"
#include "core/sha256.h"
#include "unit/temp_folder.h"

namespace safegrad {
namespace {

using nlohmann::json;
using test::expect_refused;
using test::TempFolder;
using test::write_text;

TEST(Files, SmallFilesAreReadUpToTheLimit) {
  const TempFolder folder;
  const std::string path = folder / "x";
  write_text(path, std::string("ab\0c", 4));
  EXPECT_EQ(read_small_file(path, 4), std::string("ab\0c", 4));
  expect_refused<InputError>([&] { read_small_file(path, 3); }, {path, "4 bytes", "at most 3"});
  write_text(path, "");
  EXPECT_EQ(read_small_file(path, 0), "");
  expect_refused<InputError>([&] { read_small_file(folder / "none", 9); }, {folder / "none"});
  expect_refused<InputError>([&] { read_small_file("/dev/zero", 9); }, {"/dev/zero", "device"});
}

TEST(Files, AnAtomicFileAppearsOnlyWhenCommitted) {
  const TempFolder folder;
  const std::string path = folder / "x";
  write_file_atomically(path, "first");
  EXPECT_EQ(test::read_text(path), "first");
  {
    AtomicFile file(path);
    file.write(std::as_bytes(std::span("no", 2)));
    EXPECT_EQ(test::read_text(path), "first");
  }
  EXPECT_EQ(test::read_text(path), "first");
  write_file_atomically(path, "");
  EXPECT_EQ(test::read_text(path), "");
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
}

TEST(Files, FoldersAreMadeWithThoseAboveThem) {
  const TempFolder folder;
  make_folders(folder / "a/b/c/");
  make_folders(folder / "a/b");
  EXPECT_TRUE(std::filesystem::is_directory(folder / "a/b/c"));
  write_text(folder / "a/file", "");
  expect_refused<RunError>([&] { make_folders(folder / "a/file/x"); },
                           {folder / "a/file/x: cannot be made: File exists"});
  EXPECT_EQ(test::read_text(folder / "a/file"), "");
}

TEST(Files, AFailedRenameIsReportedAndCleanedUp) {
  const TempFolder folder;
  const std::string path = folder / "taken";
  std::filesystem::create_directories(path + "/by a folder");
  expect_refused<RunError>([&] { write_file_atomically(path, "x"); }, {path, "rename"});
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
}

TEST(Files, AnErrorOfOneKindLeavesAsAnother) {
  expect_refused<ModelError>([] { rethrow_as<ModelError>([] { throw InputError("the text"); }); },
                             {"the text"});
  expect_refused<RunError>([] { rethrow_as<ModelError>([] { throw RunError("disk"); }); },
                           {"disk"});
  EXPECT_EQ(rethrow_as<ModelError>([] { return 3; }), 3);
}

TEST(Sha256, EqualsThePublishedVectors) {
  const TempFolder folder;
  const std::string path = folder / "x";
  write_text(path, "");
  EXPECT_EQ(sha256_of_file(path),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  write_text(path, "abc");
  EXPECT_EQ(sha256_of_file(path),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  write_text(path, std::string(1'000'000, 'a'));
  EXPECT_EQ(sha256_of_file(path),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  // More than one read of the buffer: 1 MiB of zero bytes and one more.
  write_text(path, std::string((1 << 20) + 1, '\0'));
  const std::string longer = sha256_of_file(path);
  write_text(path, std::string(1 << 20, '\0'));
  EXPECT_EQ(sha256_of_file(path),
            "30e14955ebf1352266dc2ff8067e68104607e750abb9d3b36582b8af909fcb58");
  EXPECT_NE(longer, sha256_of_file(path));
  expect_refused<InputError>([&] { sha256_of_file(folder / "none"); }, {folder / "none"});
  expect_refused<InputError>([&] { sha256_of_file(folder.path()); }, {"a folder"});
}

TEST(Json, TextForMessagesIsPlainAndShort) {
  EXPECT_EQ(printable("a b~"), "a b~");
  EXPECT_EQ(printable("\x1b[31m\n\\\xc3\xa9\x7f"), "\\x1b[31m\\x0a\\\\\\xc3\\xa9\\x7f");
  EXPECT_EQ(printable(std::string(500, 'x')), std::string(120, 'x') + "...");
  EXPECT_EQ(printable(std::string(120, 'x')), std::string(120, 'x'));
}

TEST(Json, DepthAndDuplicatesAreLimitedPerObject) {
  EXPECT_EQ(parse_json(R"({"a": {"a": [{"a": 1}, {"a": 2}]}, "b": {"a": 3}})", "x")["b"]["a"], 3);
  EXPECT_NO_THROW(parse_json(std::string(64, '[') + std::string(64, ']'), "x"));
  expect_refused<InputError>(
      [] { parse_json(std::string(65, '[') + std::string(65, ']'), "where"); }, {"where", "64"});
  expect_refused<InputError>([] { parse_json(R"([{"b": 1, "a": {"c": 1}, "b": 2}])", "where"); },
                             {"where", "\"b\" appears twice"});
  const std::string message = test::message_of<InputError>(
      [] { parse_json("{\"" + std::string(100'000, '\x01'), "where"); });
  EXPECT_LT(message.size(), 500u);
}

TEST(Json, LookUpsCheckTypeAndRange) {
  const json document = {{"n", 5}, {"x", 0.5}, {"b", true}, {"s", "t"}, {"null", nullptr}};
  const JsonObject object(document, "file");
  EXPECT_EQ(object.integer("n", 5, 5), 5);
  EXPECT_EQ(object.integer("null", 1, 9, 7), 7);
  EXPECT_EQ(object.positive("n"), 5.0);
  EXPECT_EQ(object.positive("x"), 0.5);
  EXPECT_TRUE(object.boolean("b", false));
  EXPECT_EQ(object.string("s"), "t");
  EXPECT_EQ(object.string("none", "fallback"), "fallback");
  EXPECT_EQ(object.find("null"), nullptr);
  expect_refused<InputError>([&] { object.integer("n", 6, 9); }, {"file: n: got 5", "from 6 to 9"});
  expect_refused<InputError>([&] { object.integer("null", 1, 9); }, {"null: got nothing"});
  expect_refused<InputError>([&] { object.integer("b", 0, 9); }, {"b: got true"});
  expect_refused<InputError>([&] { object.positive("s"); }, {"s: got \"t\""});
  expect_refused<InputError>([&] { object.boolean("n", true); }, {"n: got 5"});
  expect_refused<InputError>([&] { object.string("n"); }, {"n: got 5", "a string"});
}

}  // namespace
}  // namespace safegrad
