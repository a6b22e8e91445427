"""The clock, the spin hint and eventfds; `_os.py` is the interpreted twin."""

from libc.stdint cimport uint64_t

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <poll.h>
    #include <stdint.h>
    #include <time.h>
    #include <unistd.h>
    static inline uint64_t vr_now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    static inline void vr_relax(void) {
    #if defined(__x86_64__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ __volatile__("yield");
    #endif
    }
    static inline int vr_signal_eventfd(int fd) {
        uint64_t one = 1;
        struct pollfd room = {fd, POLLOUT, 0};
        if (poll(&room, 1, 0) == 0) return 0;
        if (write(fd, &one, sizeof one) < 0 && errno != EAGAIN && errno != EINTR) return errno;
        return 0;
    }
    """
    uint64_t now_ns "vr_now_ns"() noexcept
    void relax "vr_relax"() noexcept
    int signal_eventfd "vr_signal_eventfd"(int fd) noexcept
