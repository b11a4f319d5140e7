// torch's Store as the attach protocol sees it.
#pragma once

#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "cpu/attach.h"

namespace pycoll::bindings {

class TorchStore : public cpu::Store {
 public:
  // All keys begin with "pycoll/<name>/".
  TorchStore(const c10::intrusive_ptr<c10d::Store>& store, const std::string& name)
      : store_(c10::make_intrusive<c10d::PrefixStore>("pycoll/" + name, store)) {}

  void set(const std::string& key, const std::string& value) override {
    store_->set(key, std::vector<uint8_t>(value.begin(), value.end()));
  }
  bool has(const std::string& key) override { return store_->check({key}); }
  std::string get(const std::string& key) override {
    const std::vector<uint8_t> value = store_->get(key);
    return {value.begin(), value.end()};
  }
  int64_t add(const std::string& key, int64_t amount) override { return store_->add(key, amount); }
  void erase(const std::string& key) override {
    try {
      store_->deleteKey(key);
    } catch (const std::exception&) {  // some stores cannot: the key is small, and counted names keep it harmless
    }
  }

 private:
  c10::intrusive_ptr<c10d::Store> store_;
};

}  // namespace pycoll::bindings
