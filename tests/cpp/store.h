// An in-memory Store, through which ranks that are threads of one program meet.
#pragma once

#include <map>
#include <mutex>
#include <string>

#include "cpu/attach.h"

class MapStore : public pycoll::cpu::Store {
 public:
  void set(const std::string& key, const std::string& value) override {
    const std::lock_guard guard(lock_);
    values_[key] = value;
  }
  bool has(const std::string& key) override {
    const std::lock_guard guard(lock_);
    return values_.count(key) > 0;
  }
  std::string get(const std::string& key) override {
    const std::lock_guard guard(lock_);
    return values_.at(key);
  }
  int64_t add(const std::string& key, int64_t amount) override {
    const std::lock_guard guard(lock_);
    const int64_t sum = (values_.count(key) > 0 ? std::stoll(values_[key]) : 0) + amount;
    values_[key] = std::to_string(sum);
    return sum;
  }
  void erase(const std::string& key) override {
    const std::lock_guard guard(lock_);
    values_.erase(key);
  }

 private:
  std::mutex lock_;
  std::map<std::string, std::string> values_;
};
