// JSON, written piece by piece: json.open('{').key("a").value(1).close('}').
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace pycoll::cpu {

class Json {
 public:
  Json& open(char bracket) {
    separate();
    text_ += bracket;
    first_ = true;
    return *this;
  }
  Json& close(char bracket) {
    text_ += bracket;
    first_ = false;
    return *this;
  }
  Json& key(const char* name) {
    value(name);
    text_ += ':';
    first_ = true;
    return *this;
  }
  Json& value(int64_t number) { return raw(std::to_string(number)); }
  Json& value(uint64_t number) { return raw(std::to_string(number)); }
  Json& value(int number) { return value(int64_t{number}); }
  Json& value(const std::string& words) {
    std::string quoted = "\"";
    for (const char c : words) {
      if (c == '"' || c == '\\') quoted += '\\';
      if (static_cast<unsigned char>(c) >= 0x20) {
        quoted += c;
        continue;
      }
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), "\\u%04x", static_cast<unsigned>(c));
      quoted += escaped;
    }
    return raw(quoted + '"');
  }
  Json& value(const char* words) { return value(std::string(words)); }
  Json& null() { return raw("null"); }
  Json& yes() { return raw("true"); }

  const std::string& text() const { return text_; }

 private:
  Json& raw(const std::string& value) {
    separate();
    text_ += value;
    return *this;
  }
  void separate() {
    if (!first_) text_ += ',';
    first_ = false;
  }

  std::string text_;
  bool first_ = true;
};

}  // namespace pycoll::cpu
