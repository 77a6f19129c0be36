#include "core/safetensors.h"

#include <bit>
#include <cmath>
#include <csignal>
#include <numeric>

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "core/error.h"
#include "unit/temp_folder.h"

namespace safegrad {
namespace {

using test::expect_refused;
using test::TempFolder;
using test::tensor_of;
using test::with_header;
using test::write_tensors;
using test::write_text;

/// Opens a file of these bytes and expects an InputError that names it and has every part.
void expect_bytes_refused(const std::string& bytes, std::vector<std::string> parts) {
  const TempFolder folder;
  const std::string path = folder / "bad.safetensors";
  write_text(path, bytes);
  parts.push_back(path);
  expect_refused<InputError>([&] { SafetensorsFile file(path); }, parts);
}

/// As above, for a header text over `data_bytes` zero bytes.
void expect_header_refused(const std::string& header, size_t data_bytes,
                           const std::vector<std::string>& parts) {
  expect_bytes_refused(with_header(header, std::string(data_bytes, '\0')), parts);
}

TEST(Safetensors, WrittenTensorsAreReadBackAsTheyWere) {
  const TempFolder folder;
  const std::string path = folder / "x.safetensors";
  const std::vector<float> a = {1.5f, -2.0f, 3.25f, 0.0f, 5.0f, -0.0f};
  const std::vector<int64_t> b = {-1, 1LL << 40};
  const std::vector<uint8_t> c = {7};

  write_tensors(path,
                {tensor_of("z.first", Dtype::f32, {2, 3}, a), tensor_of("c", Dtype::u8, {1}, c),
                 tensor_of("empty", Dtype::bf16, {0, 4}, std::vector<uint16_t>{}),
                 tensor_of("scalar", Dtype::i64, {}, std::vector<int64_t>{9}),
                 tensor_of("b \"q\" \xc3\xa9", Dtype::i64, {2}, b)},
                {{"format", "pt"}, {"note", "\xe2\x82\xac"}});

  SafetensorsFile file(path);
  EXPECT_EQ(file.path(), path);
  EXPECT_EQ(file.tensors().size(), 5u);
  EXPECT_EQ(file.metadata(),
            (std::map<std::string, std::string>{{"format", "pt"}, {"note", "\xe2\x82\xac"}}));
  const TensorView& first = file.at("z.first");
  EXPECT_EQ(first.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(first.numel(), 6);
  EXPECT_EQ(std::memcmp(first.bytes.data(), a.data(), first.bytes.size()), 0);
  EXPECT_EQ(std::memcmp(file.at("b \"q\" \xc3\xa9").bytes.data(), b.data(), 16), 0);
  EXPECT_EQ(file.at("c").bytes[0], std::byte{7});
  EXPECT_EQ(file.at("empty").numel(), 0);
  EXPECT_EQ(file.at("scalar").numel(), 1);
  EXPECT_TRUE(file.contains("c"));
  EXPECT_FALSE(file.contains("d"));
  expect_refused<InputError>([&] { file.at("d\n"); }, {path, "\"d\\x0a\""});

  SafetensorsFile moved = std::move(file);
  EXPECT_EQ(moved.at("scalar").numel(), 1);
}

TEST(Safetensors, DataOfAWrittenFileBeginsAtAMultipleOfEight) {
  const TempFolder folder;
  for (int n = 1; n <= 9; ++n) {
    const std::string path = folder / "x.safetensors";
    write_tensors(path, {tensor_of(std::string(n, 'n'), Dtype::u8, {0}, std::vector<uint8_t>{})});
    EXPECT_EQ(std::filesystem::file_size(path) % 8, 0u) << "name of " << n;
  }
}

TEST(Safetensors, AFileWithoutTensorsOrMetadataIsValid) {
  const TempFolder folder;
  const std::string path = folder / "x.safetensors";
  write_text(path, with_header("{}", ""));
  SafetensorsFile file(path);
  EXPECT_TRUE(file.tensors().empty());
  EXPECT_TRUE(file.metadata().empty());
}

TEST(Safetensors, TensorsMayBeListedInAnyOrder) {
  const TempFolder folder;
  const std::string path = folder / "x.safetensors";
  write_text(path, with_header(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},
                                   "e":{"dtype":"U8","shape":[0],"data_offsets":[2,2]},
                                   "b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}   )",
                               "xyz"));
  SafetensorsFile file(path);
  EXPECT_EQ(file.at("a").bytes[0], std::byte{'z'});
  EXPECT_EQ(file.at("b").bytes[1], std::byte{'y'});
}

TEST(SafetensorsRefuses, WhatIsNotAFile) {
  const TempFolder folder;
  expect_refused<InputError>([&] { SafetensorsFile file(folder / "none"); },
                             {folder / "none", "No such file"});
  expect_refused<InputError>([&] { SafetensorsFile file(folder.path()); },
                             {folder.path(), "a folder"});
  ASSERT_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  expect_refused<InputError>([&] { SafetensorsFile file(folder / "pipe"); }, {"a pipe"});
}

TEST(SafetensorsRefuses, TruncatedFilesAndWrongLengths) {
  expect_bytes_refused("", {"has 0 bytes"});
  expect_bytes_refused("1234567", {"has 7 bytes"});
  expect_bytes_refused(std::string(8, '\0'), {"has 8 bytes"});
  expect_bytes_refused(std::string(8, '\0') + "{}", {"does not begin with '{'"});
  expect_bytes_refused(std::string(8, '\xff') + "{}", {"18446744073709551615", "100000000"});
  std::string longer = with_header("{}", "");
  longer[0] = 3;
  expect_bytes_refused(longer, {"header of 3 bytes", "has 2"});
  // Every proper prefix of a good file is refused.
  const std::string good =
      with_header(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "12345678");
  for (size_t n = 0; n < good.size(); ++n) expect_bytes_refused(good.substr(0, n), {});
  expect_bytes_refused(good + "9", {"have 8 data bytes, the file has 9"});
}

TEST(SafetensorsRefuses, BadJson) {
  expect_header_refused("[]", 0, {"does not begin with '{'"});
  expect_header_refused(" {}", 0, {"does not begin with '{'"});
  expect_header_refused("{", 0, {"not valid JSON"});
  expect_header_refused("{} x", 0, {"not valid JSON"});
  expect_header_refused("{\"\xff\":1}", 0, {"not valid JSON"});
  expect_header_refused("{\"a\":1e999}", 0, {"not valid JSON"});
  expect_header_refused(R"({"a":1})", 0, {"tensor \"a\"", "got 1"});
  std::string deep = "{\"a\":";
  deep.append(100'000, '[');
  expect_header_refused(deep, 0, {"nested deeper than 64"});
}

TEST(SafetensorsRefuses, DuplicateKeys) {
  expect_header_refused(R"({"a\n":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                            "a\n":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                        2, {"\"a\\x0a\" appears twice"});
  expect_header_refused(R"({"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}})", 1,
                        {"\"shape\" appears twice"});
}

TEST(SafetensorsRefuses, BadMetadata) {
  expect_header_refused(R"({"__metadata__":[]})", 0, {"__metadata__"});
  expect_header_refused(R"({"__metadata__":{"k":1}})", 0, {"\"k\"", "number"});
}

TEST(SafetensorsRefuses, BadTensorEntries) {
  const auto entry = [](const std::string& dtype, const std::string& shape,
                        const std::string& offsets) {
    return "{\"t\":{\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets +
           "}}";
  };
  const std::string tensor = "tensor \"t\"";
  expect_header_refused(entry("\"F8_E4M3\"", "[1]", "[0,1]"), 1, {tensor, "F8_E4M3", "BF16"});
  expect_header_refused(entry("3", "[1]", "[0,1]"), 1, {tensor, "dtype: got 3"});
  expect_header_refused(entry("\"U8\"", "1", "[0,1]"), 1, {tensor, "shape: got 1"});
  expect_header_refused(entry("\"U8\"", "[-1]", "[0,1]"), 1, {tensor, "shape"});
  expect_header_refused(entry("\"U8\"", "[1.0]", "[0,1]"), 1, {tensor, "shape"});
  expect_header_refused(entry("\"U8\"", "[9223372036854775808]", "[0,1]"), 1, {tensor, "shape"});
  expect_header_refused(entry("\"U8\"", "[99999999999999999999]", "[0,1]"), 1, {tensor, "shape"});
  expect_header_refused(entry("\"U8\"", "[1]", "[0]"), 1, {tensor, "data_offsets"});
  expect_header_refused(entry("\"U8\"", "[1]", "[0,1,2]"), 1, {tensor, "data_offsets"});
  expect_header_refused(entry("\"U8\"", "[1]", "[-1,0]"), 1, {tensor, "data_offsets"});
  expect_header_refused(entry("\"U8\"", "[1]", "[1,0]"), 1, {tensor, "[1, 0]"});
  expect_header_refused(entry("\"U8\"", "[1]", "[0,\"1\"]"), 1, {tensor, "data_offsets"});
  expect_header_refused(R"({"t":{"shape":[1],"data_offsets":[0,1]}})", 1, {tensor, "dtype"});
  expect_header_refused(R"({"t":{"dtype":"U8","data_offsets":[0,1]}})", 1, {tensor, "shape"});
  expect_header_refused(R"({"t":{"dtype":"U8","shape":[1]}})", 1, {tensor, "data_offsets"});
  expect_header_refused(R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":0}})", 1,
                        {tensor, "unknown key \"x\""});
}

TEST(SafetensorsRefuses, ShapesThatDoNotMatchTheirBytes) {
  const auto f32 = [](const std::string& shape, const std::string& offsets) {
    return "{\"t\":{\"dtype\":\"F32\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}}";
  };
  expect_header_refused(f32("[2,3]", "[0,20]"), 20, {"[2, 3]", "24", "20"});
  expect_header_refused(f32("[]", "[0,0]"), 0, {"needs 4 bytes"});
  // 2^62 * 8 * 4 wraps to 0 in 64 bits.
  expect_header_refused(f32("[4611686018427387904,8]", "[0,0]"), 0, {"2^63-1"});
  expect_header_refused(f32("[4294967296,4294967296]", "[0,0]"), 0, {"2^63-1"});
  expect_header_refused(f32("[4611686018427387904,8,0]", "[0,0]"), 0, {"2^63-1"});
  expect_header_refused(f32("[2305843009213693951]", "[0,9223372036854775804]"), 4,
                        {"9223372036854775804", "the file has 4"});
}

TEST(SafetensorsRefuses, GapsOverlapsAndDataOutsideTheFile) {
  const auto two = [](const std::string& a, const std::string& b) {
    return R"({"a":{"dtype":"U8","shape":[2],"data_offsets":)" + a +
           R"(},"b":{"dtype":"U8","shape":[2],"data_offsets":)" + b + "}}";
  };
  expect_header_refused(two("[0,2]", "[1,3]"), 3, {"\"b\"", "overlap"});
  expect_header_refused(two("[0,2]", "[0,2]"), 2, {"overlap"});
  expect_header_refused(two("[0,2]", "[3,5]"), 5, {"\"b\"", "gap", "byte 3", "2"});
  expect_header_refused(two("[1,3]", "[3,5]"), 5, {"\"a\"", "gap"});
  expect_header_refused(two("[0,2]", "[2,4]"), 3, {"\"b\"", "4", "3"});
  expect_header_refused(two("[0,2]", "[2,4]"), 5, {"4", "5"});
}

/// Half precision by its definition: sign, 5 bits of exponent, 10 of mantissa.
float slow_half(uint16_t half) {
  const float sign = half >> 15 ? -1.0f : 1.0f;
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
}

std::vector<uint16_t> all_words() {
  std::vector<uint16_t> words(65536);
  std::iota(words.begin(), words.end(), uint16_t{0});
  return words;
}

TEST(ReadAsFloat, EveryHalfEqualsItsDefinition) {
  const std::vector<uint16_t> words = all_words();
  const TensorView view{Dtype::f16, {65536}, std::as_bytes(std::span(words))};
  std::vector<float> out(65536);

  read_as_float(view, 0, 65536, out.data());

  for (int i = 0; i < 65536; ++i) {
    const float expected = slow_half(words[i]);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(out[i])) << i;
    } else {
      ASSERT_EQ(std::bit_cast<uint32_t>(out[i]), std::bit_cast<uint32_t>(expected)) << i;
    }
  }
}

TEST(ReadAsFloat, EveryBf16IsTheUpperHalfOfItsFloat) {
  const std::vector<uint16_t> words = all_words();
  const TensorView view{Dtype::bf16, {256, 256}, std::as_bytes(std::span(words))};
  std::vector<float> out(65536);

  read_as_float(view, 0, 65536, out.data());

  for (int i = 0; i < 65536; ++i) {
    ASSERT_EQ(std::bit_cast<uint32_t>(out[i]), static_cast<uint32_t>(i) << 16) << i;
  }
}

TEST(ReadAsFloat, RangesOfUnalignedDataAreExact) {
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
    std::vector<std::byte> storage(1 + 37 * size_of(dtype));
    for (size_t i = 0; i < storage.size(); ++i) storage[i] = std::byte(i * 7 % 120);
    const TensorView view{dtype, {37}, std::span(storage).subspan(1)};
    std::vector<float> whole(37);
    read_as_float(view, 0, 37, whole.data());
    for (int64_t begin = 0; begin <= 37; ++begin) {
      for (int64_t end = begin; end <= 37; ++end) {
        std::vector<float> out(end - begin + 1, -7.0f);
        read_as_float(view, begin, end, out.data());
        ASSERT_TRUE(std::equal(whole.begin() + begin, whole.begin() + end, out.begin()));
        ASSERT_EQ(out.back(), -7.0f);
      }
    }
  }
}

TEST(ReadAsFloat, RefusesOtherTypesAndRangesOutside) {
  const std::vector<int64_t> words = {1, 2};
  const TensorView view{Dtype::i64, {2}, std::as_bytes(std::span(words))};
  float out[2];
  expect_refused<InputError>([&] { read_as_float(view, 0, 2, out); }, {"I64", "F32"});
  const TensorView floats{Dtype::f32, {4}, std::as_bytes(std::span(words))};
  expect_refused<UsageError>([&] { read_as_float(floats, 0, 5, out); }, {"[0, 5)", "4"});
  expect_refused<UsageError>([&] { read_as_float(floats, -1, 1, out); }, {"[-1, 1)"});
  expect_refused<UsageError>([&] { read_as_float(floats, 2, 1, out); }, {"[2, 1)"});
}

TEST(SafetensorsWriter, LeavesTheOldFileUntilItIsFinished) {
  const TempFolder folder;
  const std::string path = folder / "x.safetensors";
  write_text(path, "old");
  {
    SafetensorsWriter writer(path, {{"a", Dtype::u8, {2}}}, {});
    writer.append(std::as_bytes(std::span("x", 1)));
    EXPECT_EQ(test::read_text(path), "old");
    EXPECT_TRUE(std::filesystem::exists(path + ".tmp"));
    expect_refused<UsageError>([&] { writer.finish(); }, {path, "1 bytes of the 2"});
    expect_refused<UsageError>([&] { writer.append(std::as_bytes(std::span("xy", 2))); },
                               {path, "2 bytes appended after 1 of the 2"});
  }
  EXPECT_EQ(test::read_text(path), "old");
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));

  SafetensorsWriter writer(path, {{"a", Dtype::u8, {2}}}, {});
  writer.append(std::as_bytes(std::span("x", 1)));
  writer.append(std::as_bytes(std::span("y", 1)));
  writer.finish();
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
  EXPECT_EQ(SafetensorsFile(path).at("a").bytes[1], std::byte{'y'});
  expect_refused<UsageError>([&] { writer.finish(); }, {path});
}

TEST(SafetensorsWriter, RefusesDeclarationsItCannotKeep) {
  const TempFolder folder;
  const std::string path = folder / "x.safetensors";
  const auto declare = [&](std::vector<SafetensorsWriter::Entry> entries,
                           std::map<std::string, std::string> metadata,
                           const std::vector<std::string>& parts) {
    expect_refused<UsageError>([&] { SafetensorsWriter writer(path, entries, metadata); }, parts);
    EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
  };
  declare({{"a", Dtype::u8, {1}}, {"a", Dtype::u8, {1}}}, {}, {path, "\"a\"", "twice"});
  declare({{"__metadata__", Dtype::u8, {1}}}, {}, {"reserved"});
  declare({{"a", Dtype::u8, {-1}}}, {}, {"\"a\"", "-1"});
  declare({{"a", Dtype::u8, {int64_t{1} << 62, 8}}}, {}, {"\"a\"", "4611686018427387904, 8"});
  declare({{"a", Dtype::u8, {int64_t{1} << 62}}, {"b", Dtype::u8, {int64_t{1} << 62}}}, {},
          {"\"b\""});
  declare({{"\xff", Dtype::u8, {1}}}, {}, {"UTF-8"});
  declare({}, {{"k", "\xff"}}, {"UTF-8"});
}

TEST(SafetensorsWriter, ReportsAFolderThatIsNotThere) {
  const TempFolder folder;
  const std::string path = folder / "none/x.safetensors";
  expect_refused<RunError>([&] { SafetensorsWriter writer(path, {}, {}); },
                           {path, "No such file or directory"});
}

TEST(SafetensorsWriter, ReportsAFullDiskAndCleansUp) {
  const TempFolder folder;
  const std::string path = folder / "x.safetensors";
  write_text(path, "old");
  // A limit on file sizes stands in for a full disk; both make write() fail half-way.
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{64 << 10, before.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const std::vector<std::byte> data(1 << 20);

  SafetensorsWriter writer(path, {{"a", Dtype::u8, {2 << 20}}}, {});
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  expect_refused<RunError>([&] { writer.append(data); }, {path, "File too large"});
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);

  expect_refused<UsageError>([&] { writer.append(data); }, {path, "failure"});
  EXPECT_EQ(test::read_text(path), "old");
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
}

}  // namespace
}  // namespace safegrad
