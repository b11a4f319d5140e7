#include "cpu/descriptors.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "cpu/error.h"

namespace pycoll::cpu {

namespace {

constexpr size_t kTokenBytes = 33;

struct Label {
  char token[kTokenBytes];
  int32_t sender;
  uint64_t tag;
};

// A label as sendmsg and recvmsg take it, with room for the descriptors.
struct Parcel {
  Label label{};
  iovec data{&label, sizeof(label)};
  alignas(cmsghdr) char room[CMSG_SPACE(DescriptorBox::kMost * sizeof(int))] = {};
  msghdr header{};

  Parcel() {
    header.msg_iov = &data;
    header.msg_iovlen = 1;
    header.msg_control = room;
    header.msg_controllen = sizeof(room);
  }
  Parcel(const Parcel&) = delete;
};

sockaddr_un address_of(const std::string& token, socklen_t& length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string name = "pycoll-" + token;  // abstract: sun_path begins with a zero byte
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

timeval to_timeval(std::chrono::milliseconds time) { return {time.count() / 1000, time.count() % 1000 * 1000}; }

DescriptorBox::Sent why_not(int error) {
  switch (error) {
    case EAGAIN:
    case ETOOMANYREFS:
    case ENOBUFS:
    case ENOMEM:
    case EINTR:
      return DescriptorBox::Sent::kNoRoom;
    case ECONNREFUSED:
    case ECONNRESET:
    case EPIPE:
      return DescriptorBox::Sent::kNoSuchBox;
    default:
      return DescriptorBox::Sent::kNo;
  }
}

}  // namespace

DescriptorBox::DescriptorBox(int backlog)
    : token_(random_token()), listener_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) {
  socklen_t length = 0;
  const sockaddr_un address = address_of(token_, length);
  if (!listener_ || bind(listener_.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0 ||
      listen(listener_.get(), backlog) != 0) {
    throw_errno("opening a local socket failed");
  }
}

DescriptorBox::Sent DescriptorBox::send(const std::string& token, int sender, uint64_t tag,
                                        std::span<const int> descriptors) {
  const Fd s(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!s) throw_errno("opening a local socket failed");
  socklen_t length = 0;
  const sockaddr_un address = address_of(token, length);
  if (connect(s.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) return why_not(errno);
  Parcel parcel;
  std::memcpy(parcel.label.token, token.c_str(), kTokenBytes);
  parcel.label.sender = sender;
  parcel.label.tag = tag;
  parcel.header.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
  cmsghdr* rights = CMSG_FIRSTHDR(&parcel.header);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(descriptors.size_bytes());
  std::memcpy(CMSG_DATA(rights), descriptors.data(), descriptors.size_bytes());
  return sendmsg(s.get(), &parcel.header, MSG_NOSIGNAL) == sizeof(Label) ? Sent::kYes : why_not(errno);
}

std::optional<Delivery> DescriptorBox::take(std::chrono::milliseconds patience) {
  pollfd p{listener_.get(), POLLIN, 0};
  if (patience.count() > 0) poll(&p, 1, static_cast<int>(patience.count()));
  const Fd s(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!s) return std::nullopt;
  ucred credentials{};
  socklen_t length = sizeof(credentials);
  const timeval second = to_timeval(std::chrono::seconds(1));
  setsockopt(s.get(), SOL_SOCKET, SO_RCVTIMEO, &second, sizeof(second));
  getsockopt(s.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &length);
  if (credentials.uid != geteuid()) return std::nullopt;
  Parcel parcel;
  const ssize_t got = recvmsg(s.get(), &parcel.header, MSG_CMSG_CLOEXEC);
  const cmsghdr* rights = got > 0 ? CMSG_FIRSTHDR(&parcel.header) : nullptr;
  if (rights == nullptr || rights->cmsg_type != SCM_RIGHTS) return std::nullopt;
  Delivery delivery{parcel.label.sender, parcel.label.tag, {}};
  int descriptors[kMost];
  const size_t bytes = rights->cmsg_len - CMSG_LEN(0);
  std::memcpy(descriptors, CMSG_DATA(rights), bytes);
  for (size_t i = 0; i < bytes / sizeof(int); ++i) delivery.descriptors.emplace_back(descriptors[i]);
  const bool meant = got == sizeof(Label) && std::memcmp(parcel.label.token, token_.c_str(), kTokenBytes) == 0;
  return meant ? std::optional(std::move(delivery)) : std::nullopt;
}

}  // namespace pycoll::cpu
