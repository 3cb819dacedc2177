/* The process that holds a pod's network namespace open: it waits for ever, reaps what is reparented to it, and ends at once
 * on SIGTERM (a pid 1 without handlers ignores it, and every pod deletion would then take the whole grace period). */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void stop(int signal_number) {
    (void)signal_number;
    _exit(0);
}

static void reap(int signal_number) {
    (void)signal_number;
    while (waitpid(-1, NULL, WNOHANG) > 0) {
    }
}

int main(void) {
    signal(SIGTERM, stop);
    signal(SIGINT, stop);
    signal(SIGCHLD, reap);
    for (;;) {
        pause();
    }
}
