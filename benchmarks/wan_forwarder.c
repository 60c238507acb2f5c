/*
 * Carries IP packets between TUN devices as a slow wire would: wan_forwarder SEED BOARD_FD TUN_FD...
 *
 * Host number i owns the i-th TUN device and the address ending in i + 1. What each ordered pair of
 * hosts shall do, and what it did, stands on the board: shared memory, laid out as in wan_board.py.
 * A packet waits while earlier ones are being sent, takes the wire for its own time, may then be
 * lost, and arrives one delay later; one that would wait longer than the queue holds is dropped.
 * Standard input carries nothing: when it ends, so does this program.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define MAX_HOSTS 64
#define MAX_PACKET_BYTES 65536
#define BURST 64              /* packets read from one host before the others get their turn */
#define LATE_NS 1000000       /* a delivery this far behind its time says the machine was too busy */
#define SECOND_NS 1000000000.0

struct pair {
    volatile double rate_bit_per_s, delay_s, loss, queue_s;
    volatile uint64_t up;
    volatile uint64_t sent_packets, sent_bytes, delivered_packets, delivered_bytes;
    volatile uint64_t lost_packets, dropped_packets, cut_packets, late_packets;
    uint64_t reserved[3];
};

struct packet {
    int64_t due_ns;
    uint32_t bytes;
    uint8_t content[];
};

/* Packets on their way from one host to another, in a ring that grows. */
struct wire {
    struct packet **ring;
    uint64_t capacity, first, end; /* capacity is a power of two; first and end only grow */
    int64_t free_ns, last_due_ns;
    uint64_t dice;
};

static int hosts, tun[MAX_HOSTS];
static struct pair *board;
static struct wire *wires;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Uniform in [0, 1): xorshift64*, one stream for each wire. */
static double roll(struct wire *wire)
{
    uint64_t x = wire->dice;
    x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
    wire->dice = x;
    return (double)((x * 2685821657736338717ULL) >> 11) / 9007199254740992.0;
}

static struct packet **slot(struct wire *wire, uint64_t index)
{
    return &wire->ring[index & (wire->capacity - 1)];
}

static void grow(struct wire *wire)
{
    struct wire larger = *wire;
    larger.capacity = wire->capacity ? 2 * wire->capacity : 64;
    larger.ring = malloc(larger.capacity * sizeof *larger.ring);
    if (!larger.ring)
        fail("wan_forwarder: no memory for packets");
    for (uint64_t i = wire->first; i < wire->end; i++)
        *slot(&larger, i) = *slot(wire, i);
    free(wire->ring);
    *wire = larger;
}

static void push(struct wire *wire, const uint8_t *content, uint32_t bytes, int64_t due_ns)
{
    struct packet *packet = malloc(sizeof *packet + bytes);
    if (!packet)
        fail("wan_forwarder: no memory for a packet");
    packet->due_ns = due_ns;
    packet->bytes = bytes;
    memcpy(packet->content, content, bytes);
    if (wire->end - wire->first == wire->capacity)
        grow(wire);
    *slot(wire, wire->end++) = packet;
}

/* Take a packet onto the wire, or not: cut, no room in the queue, or lost on the way. */
static void take(struct pair *pair, struct wire *wire, const uint8_t *content, uint32_t bytes)
{
    int64_t now = now_ns();
    int64_t start = wire->free_ns > now ? wire->free_ns : now;
    pair->sent_packets++;
    pair->sent_bytes += bytes;
    if (!pair->up) {
        pair->cut_packets++;
        return;
    }
    if (start - now > (int64_t)(pair->queue_s * SECOND_NS)) {
        pair->dropped_packets++;
        return;
    }
    wire->free_ns = start + (int64_t)(bytes * 8.0 / pair->rate_bit_per_s * SECOND_NS);
    if (roll(wire) < pair->loss) {
        pair->lost_packets++;
        return;
    }
    int64_t due = wire->free_ns + (int64_t)(pair->delay_s * SECOND_NS);
    if (due < wire->last_due_ns) /* a shorter delay was set: nobody overtakes */
        due = wire->last_due_ns;
    wire->last_due_ns = due;
    push(wire, content, bytes, due);
}

static void deliver(struct pair *pair, const struct packet *packet, int target, int64_t late_ns)
{
    if (!pair->up) {
        pair->cut_packets++;
    } else if (write(tun[target], packet->content, packet->bytes) != packet->bytes) {
        pair->dropped_packets++; /* the host takes no packets now; a wire cannot help that */
    } else {
        pair->delivered_packets++;
        pair->delivered_bytes += packet->bytes;
        pair->late_packets += late_ns > LATE_NS;
    }
}

/* Deliver what is due; the time of the next delivery, or -1 if nothing is on its way. */
static int64_t deliver_due(void)
{
    int64_t next = -1;
    for (int i = 0; i < hosts * hosts; i++) {
        struct wire *wire = &wires[i];
        while (wire->first < wire->end) {
            struct packet *packet = *slot(wire, wire->first);
            int64_t late_ns = now_ns() - packet->due_ns;
            if (late_ns < 0) {
                if (next < 0 || packet->due_ns < next)
                    next = packet->due_ns;
                break;
            }
            deliver(&board[i], packet, i % hosts, late_ns);
            free(packet);
            wire->first++;
        }
    }
    return next;
}

/* Read what a host sends; only IPv4 to another host goes on. */
static void read_host(int source)
{
    static uint8_t content[MAX_PACKET_BYTES];
    for (int i = 0; i < BURST; i++) {
        ssize_t bytes = read(tun[source], content, sizeof content);
        if (bytes < 20)
            return;
        int target = content[19] - 1;
        if (content[0] >> 4 != 4 || content[16] != 10 || target < 0 || target >= hosts
            || target == source)
            continue;
        int number = source * hosts + target;
        take(&board[number], &wires[number], content, (uint32_t)bytes);
    }
}

static void carry(void)
{
    struct pollfd polled[MAX_HOSTS + 1];
    for (int i = 0; i < hosts; i++)
        polled[i] = (struct pollfd){.fd = tun[i], .events = POLLIN};
    polled[hosts] = (struct pollfd){.fd = STDIN_FILENO, .events = POLLIN};
    while (!polled[hosts].revents) {
        int64_t next = deliver_due();
        int64_t wait_ns = next - now_ns();
        if (wait_ns < 0)
            wait_ns = 0;
        struct timespec wait = {wait_ns / 1000000000, wait_ns % 1000000000};
        ppoll(polled, hosts + 1, next < 0 ? NULL : &wait, NULL);
        for (int i = 0; i < hosts; i++)
            if (polled[i].revents)
                read_host(i);
    }
}

int main(int count, char **words)
{
    hosts = count - 3;
    if (hosts < 2 || hosts > MAX_HOSTS) {
        fprintf(stderr, "usage: wan_forwarder SEED BOARD_FD TUN_FD TUN_FD...\n");
        return 2;
    }
    for (int i = 0; i < hosts; i++)
        tun[i] = atoi(words[i + 3]);
    board = mmap(NULL, hosts * hosts * sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED,
                 atoi(words[2]), 0);
    wires = calloc(hosts * hosts, sizeof *wires);
    if (board == MAP_FAILED || !wires)
        fail("wan_forwarder: no board");
    for (int i = 0; i < hosts * hosts; i++) /* odd, so never the zero that xorshift cannot leave */
        wires[i].dice = (strtoull(words[1], NULL, 10) * 1000003 + i) * 0x9E3779B97F4A7C15ULL | 1;

    /* A wire does not slow down because the machine is busy. Where this is refused, it does, and
     * late_packets tells. */
    prctl(PR_SET_TIMERSLACK, 1);
    sched_setscheduler(0, SCHED_RR, &(struct sched_param){.sched_priority = 1});
    carry();
    return 0;
}
