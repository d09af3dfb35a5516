// Explains why a block hangs: which threads wait where, and which of those that they wait for ended
// or wait elsewhere. Only called when something is wrong.
#include "diagnosis.h"

#include <cstdio>

namespace emulator {
namespace {

const char* name_of(Meeting meeting) {
  switch (meeting) {
    case Meeting::kSyncThreads:
      return "__syncthreads";
    case Meeting::kSyncThreadsOr:
      return "__syncthreads_or";
    case Meeting::kSyncThreadsAnd:
      return "__syncthreads_and";
    case Meeting::kSyncThreadsCount:
      return "__syncthreads_count";
    case Meeting::kSyncWarp:
      return "__syncwarp";
    case Meeting::kBallot:
      return "__ballot_sync";
    case Meeting::kAny:
      return "__any_sync";
    case Meeting::kAll:
      return "__all_sync";
    case Meeting::kShfl:
      return "__shfl_sync";
    case Meeting::kShflUp:
      return "__shfl_up_sync";
    case Meeting::kShflDown:
      return "__shfl_down_sync";
    case Meeting::kShflXor:
      return "__shfl_xor_sync";
  }
  return "?";
}

std::string hexadecimal(unsigned value) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", value);
  return text;
}

bool alike(const Thread& a, const Thread& b) {
  if (a.state != State::kWaits || b.state != State::kWaits) return a.state == b.state;
  return a.waits_with(b);
}

// "thread 0", "threads 0-31, 64": those that are in the same state as `like`.
std::string list_alike(const std::vector<Thread>& threads, const Thread& like) {
  std::string list;
  int count = 0;
  const int size = static_cast<int>(threads.size());
  for (int i = 0; i < size; ++i) {
    if (!alike(threads[i], like)) continue;
    const int first = i;
    while (i + 1 < size && alike(threads[i + 1], like)) ++i;
    count += i - first + 1;
    list += (list.empty() ? "" : ", ") + std::to_string(first);
    if (i > first) list += "-" + std::to_string(i);
  }
  return (count == 1 ? "thread " : "threads ") + list;
}

}  // namespace

bool is_barrier(Meeting meeting) { return meeting <= Meeting::kSyncThreadsCount; }

std::string name_call(Meeting meeting, unsigned mask, Place place) {
  std::string file = place.file_name();
  file.erase(0, file.rfind('/') + 1);
  std::string name = name_of(meeting);
  if (mask != 0) name += "(mask " + hexadecimal(mask) + ")";
  return name + " at " + file + ":" + std::to_string(place.line());
}

std::string describe_hang(const std::vector<Thread>& threads) {
  std::string text;
  for (size_t i = 0; i < threads.size(); ++i) {
    const Thread& thread = threads[i];
    bool named = false;
    for (size_t earlier = 0; earlier < i && !named; ++earlier)
      named = alike(threads[earlier], thread);
    if (named) continue;
    const std::string who = list_alike(threads, thread);
    const bool one = who.starts_with("thread ");
    text += (text.empty() ? "" : "; ") + who;
    if (thread.state == State::kEnded) {
      text += " ended";
    } else {
      text +=
          (one ? " waits at " : " wait at ") + name_call(thread.meeting, thread.mask, thread.place);
    }
  }
  return "hangs: " + text +
         ". All threads of a block must reach the same barrier, and all lanes that a mask names "
         "the "
         "same call";
}

}  // namespace emulator
