"""The clock, the spin hint, eventfds, mappings, registers in files; `_os.py` is the interpreted twin."""

from libc.stdint cimport uint32_t, uint64_t

from virtio.ring._mem cimport Mem

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <poll.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>
    static inline uint64_t vr_now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    static inline uint64_t vr_ticks(void) {
    #if defined(__x86_64__)
        return __builtin_ia32_rdtsc();
    #else
        return vr_now_ns();
    #endif
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
    static inline int vr_write_eventfd(int fd) {
        uint64_t one = 1;
        if (write(fd, &one, sizeof one) < 0 && errno != EAGAIN && errno != EINTR) return errno;
        return 0;
    }
    static inline int vr_sleep_on(int fd, int end, uint64_t ns) {
        uint64_t count;
        struct iovec into = {&count, sizeof count};
        struct pollfd two[2] = {{fd, POLLIN, 0}, {end, POLLIN, 0}};
        struct timespec left = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
        int found = ppoll(two, 2, &left, 0);
        if (found == 0) return 0;
        if (found < 0 || two[1].revents || two[0].revents != POLLIN) return -1;
        return preadv2(fd, &into, 1, -1, RWF_NOWAIT) < 0 && errno != EAGAIN ? -1 : 1;
    }
    static int vr_replace_mapping(vr_mem at, int fd, vr_mem fresh, int fresh_fd) {
        off_t begin, end = 0;
        while ((size_t)end < at.size) {
            begin = lseek(fd, end, 3);  /* SEEK_DATA: holes stay without memory */
            if (begin < 0 && errno == ENXIO) break;
            end = begin < 0 ? -1 : lseek(fd, begin, 4);  /* SEEK_HOLE */
            if (end < 0) { begin = 0; end = (off_t)at.size; }
            memcpy(fresh.base + begin, at.base + begin, (size_t)(end - begin));
        }
        if (mmap(at.base, at.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fresh_fd, 0) == MAP_FAILED)
            return errno;
        madvise(at.base, at.size, 10);  /* MADV_DONTFORK */
        return 0;
    }
    static inline int vr_write_at(int fd, uint64_t offset, uint32_t value, int width) {
        uint16_t narrow = (uint16_t)value;
        ssize_t done;
        do done = pwrite(fd, width == 2 ? (void *)&narrow : (void *)&value, width, (off_t)offset);
        while (done < 0 && errno == EINTR);
        return done == width ? 0 : done < 0 ? errno : EIO;
    }
    """
    uint64_t now_ns "vr_now_ns"() noexcept
    uint64_t ticks "vr_ticks"() noexcept
    void relax "vr_relax"() noexcept
    int signal_eventfd "vr_signal_eventfd"(int fd) noexcept
    int write_eventfd "vr_write_eventfd"(int fd) noexcept
    int sleep_on "vr_sleep_on"(int fd, int end, uint64_t ns) noexcept
    int replace_mapping "vr_replace_mapping"(Mem at, int fd, Mem fresh, int fresh_fd) noexcept
    int write_at "vr_write_at"(int fd, uint64_t offset, uint32_t value, int width) noexcept
