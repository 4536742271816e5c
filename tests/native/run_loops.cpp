// Loops on the engine's pool, from several callers at once: every task is done once, whatever goes wrong.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "layout.h"

using decouplify::Share;

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

struct Tasks {
  std::vector<int> done;
  int fails;  // the task that finds no memory, or -1
};

void run_share(void* context, const Share& share) {
  auto* tasks = static_cast<Tasks*>(context);
  for (int i = share.begin; i < share.end; ++i) {
    if (i == tasks->fails) throw std::bad_alloc();
    ++tasks->done[i];
  }
}

void run_once(int n_threads, int n_tasks) {
  Tasks tasks{std::vector<int>(n_tasks), -1};
  decouplify::run_parallel(n_threads, n_tasks, run_share, &tasks);
  for (int count : tasks.done) check(count == 1, "a task was not done once");
}

void run_without_memory(int n_threads, int n_tasks, int fails) {
  Tasks tasks{std::vector<int>(n_tasks), fails};
  try {
    decouplify::run_parallel(n_threads, n_tasks, run_share, &tasks);
    check(false, "nobody heard that there was no memory");
  } catch (const std::bad_alloc&) {
  }
  for (int count : tasks.done) check(count <= 1, "a task was done again");
}

void call(int seed, int n_loops) {
  for (int i = 0; i < n_loops; ++i) {
    const int n_threads = 1 + (i + seed) % 5, n_tasks = 1 + (7 * i + seed) % 50;
    i % 10 == 0 ? run_without_memory(n_threads, n_tasks, i % n_tasks) : run_once(n_threads, n_tasks);
  }
}

}  // namespace

int main(int n_arguments, char** arguments) {
  const int n_loops = std::atoi(arguments[1]);
  if (n_arguments > 2 && std::strcmp(arguments[2], "few-threads") == 0) {
    const rlimit little{64 << 20, 64 << 20};  // bytes of address space: room for a few stacks at most
    check(setrlimit(RLIMIT_AS, &little) == 0, "the limit was refused");
    for (int i = 0; i < n_loops; ++i) run_once(100, 500);
    return 0;
  }
  run_once(100, 5000);
  std::thread second(call, 1, n_loops), third(call, 2, n_loops);
  call(3, n_loops);
  second.join();
  third.join();
  const pid_t child = fork();
  if (child == 0) {
    call(4, n_loops / 10);
    _exit(0);
  }
  int status = 1;
  check(waitpid(child, &status, 0) == child && status == 0, "the child of a fork failed");
  return 0;
}
