// key_lister.h: the names of all keys, and which of them a wrong name was meant to be.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "core/config_keys.h"

namespace safegrad {

/// A visitor that lists the keys of a section: `own` by name, `all` with the dotted paths below it.
struct KeyLister {
  std::string prefix;
  std::vector<std::string> own, all;

  template <class Member, class... Rule>
  void key(std::string_view name, Member&, Rule...) {
    own.emplace_back(name);
    all.push_back(fmt::format("{}{}", prefix, name));
  }
  template <class Section>
  void section(std::string_view name, Section&) {
    Section fresh;
    add_section(name, fresh);
  }
  template <class Section>
  void section(std::string_view name, std::optional<Section>&) {
    Section fresh;
    add_section(name, fresh);
  }
  template <class Section>
  void list(std::string_view name, std::vector<Section>& sections) {
    key(name, sections);  // no path leads below a list: it is given as a whole
  }

 private:
  template <class Section>
  void add_section(std::string_view name, Section& section) {
    key(name, section);
    KeyLister below{.prefix = all.back() + ".", .own = {}, .all = {}};
    describe(below, section);
    all.insert(all.end(), below.all.begin(), below.all.end());
  }
};

/// The keys of one section; `prefix` is what its dotted paths begin with.
template <class Section>
KeyLister list_keys(std::string prefix) {
  KeyLister lister{.prefix = std::move(prefix), .own = {}, .all = {}};
  Section fresh;
  describe(lister, fresh);
  return lister;
}

/// The name out of `names` that `name` is probably a misspelling of; empty if none is near.
std::string nearest_name(std::string_view name, const std::vector<std::string>& names);

/// The right key that was probably meant by `name` inside a section with the keys `own`: a
/// misspelling of one of them, or the same name in another section. Empty if nothing is near. A
/// dotted `name` that spells a whole path is that path.
std::string nearest_key(const std::string& prefix, std::string_view name,
                        const std::vector<std::string>& own);

}  // namespace safegrad
