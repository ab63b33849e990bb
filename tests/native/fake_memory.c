/* The double's memory: device memory in an arena far from the heap, pinned host memory, and what
 * copies and fills do to both. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fake_internal.h"

enum { ALIGNMENT = 512 };

static const size_t arena_bytes = (size_t)1 << 30;
/* A bit that no address of a process has: mapped pinned memory's addresses on the device. */
static const drv_address mapped_bit = (drv_address)1 << 60;

struct allocation {
    struct allocation *next; /* device memory: by address; pinned: in any order */
    unsigned char *start;
    size_t bytes;
    bool mapped; /* pinned, and the device may use it */
};

static unsigned char *arena; /* reserved at the first allocation, kept */
static struct allocation *device_list, *pinned_list;

/* ---- ranges ---------------------------------------------------------------------------------- */

static bool inside(const struct allocation *one, const void *start, size_t bytes) {
    uintptr_t from = (uintptr_t)start, base = (uintptr_t)one->start;
    return from >= base && from - base <= one->bytes && bytes <= one->bytes - (from - base);
}

static struct allocation *find(struct allocation *list, const void *start, size_t bytes) {
    while (list && !inside(list, start, bytes))
        list = list->next;
    return list;
}

void *fake_host(drv_address address) {
    return (void *)(uintptr_t)(address & ~mapped_bit);
}

bool good_device_range(drv_address address, size_t bytes) {
    const struct allocation *pinned = find(pinned_list, fake_host(address), bytes);
    if (address & mapped_bit)
        return pinned && pinned->mapped;
    return find(device_list, fake_host(address), bytes) != NULL;
}

enum host_memory host_range(const void *host, size_t bytes) {
    uintptr_t from = (uintptr_t)host, base = (uintptr_t)arena;
    if (!host || (arena && from - base < arena_bytes))
        return HOST_BAD;
    if (find(pinned_list, host, bytes))
        return HOST_PINNED;
    return find(pinned_list, host, 1) ? HOST_BAD : HOST_PAGEABLE;
}

size_t live_allocations(bool pinned) {
    size_t count = 0;
    for (struct allocation *one = pinned ? pinned_list : device_list; one; one = one->next)
        count++;
    return count;
}

/* ---- device memory --------------------------------------------------------------------------- */

static bool reserve_arena(void) {
    if (arena)
        return true;
    /* Only a hint; it is free under the address and thread sanitizers too. */
    void *far = (void *)(uintptr_t)0x7ea000000000u;
    void *memory = mmap(far, arena_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return false;
    arena = memory;
    return true;
}

/* First fit between the live allocations. */
static drv_result allocate(drv_address *address, size_t bytes) {
    if (!bytes)
        return DRV_ERROR_INVALID_VALUE;
    if (!reserve_arena() || bytes > arena_bytes)
        return DRV_ERROR_OUT_OF_MEMORY;
    unsigned char *start = arena;
    struct allocation **link = &device_list;
    while (*link && (size_t)((*link)->start - start) < bytes) {
        start = (*link)->start + ((*link)->bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        link = &(*link)->next;
    }
    if (bytes > arena_bytes - (size_t)(start - arena))
        return DRV_ERROR_OUT_OF_MEMORY;
    struct allocation *made = new_memory(sizeof *made);
    *made = (struct allocation){.next = *link, .start = start, .bytes = bytes};
    *link = made;
    memset(start, 0xcd, bytes); /* new memory holds rubbish */
    *address = (drv_address)(uintptr_t)start;
    return DRV_SUCCESS;
}

/* Takes the allocation that starts at `start` out of a list; the caller frees it. NULL: none. */
static struct allocation *take(struct allocation **link, const void *start) {
    while (*link && (*link)->start != start)
        link = &(*link)->next;
    struct allocation *taken = *link;
    if (taken)
        *link = taken->next;
    return taken;
}

drv_result cuMemAlloc(drv_address *address, size_t bytes) {
    ENTER_WITH_CONTEXT();
    drv_result forbidden = forbid_unsafe();
    return leave(forbidden ? forbidden : allocate(address, bytes));
}

drv_result cuMemFree(drv_address address) {
    ENTER_WITH_CONTEXT();
    drv_result forbidden = forbid_unsafe();
    if (forbidden || !address)
        return leave(forbidden);
    struct allocation *taken = take(&device_list, fake_host(address));
    if (!taken) {
        violation("cuMemFree of an address that was not allocated");
        return leave(DRV_ERROR_INVALID_VALUE);
    }
    memset(taken->start, 0xdd, taken->bytes); /* whoever still reads it shall notice */
    free(taken);
    return leave(DRV_SUCCESS);
}

drv_result cuMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    ENTER_WITH_CONTEXT();
    *total_bytes = *free_bytes = arena_bytes;
    for (struct allocation *one = device_list; one; one = one->next)
        *free_bytes -= one->bytes;
    return leave(DRV_SUCCESS);
}

/* ---- pinned memory --------------------------------------------------------------------------- */

drv_result cuMemHostAlloc(void **host, size_t bytes, unsigned int flags) {
    ENTER_WITH_CONTEXT();
    drv_result forbidden = forbid_unsafe();
    if (forbidden || !bytes)
        return leave(forbidden ? forbidden : DRV_ERROR_INVALID_VALUE);
    struct allocation *made = new_memory(sizeof *made);
    *made = (struct allocation){.next = pinned_list, .bytes = bytes};
    made->mapped = flags & DRV_HOST_ALLOC_DEVICE_MAP;
    if (posix_memalign((void **)&made->start, 4096, bytes))
        abort();
    memset(made->start, 0xcd, bytes);
    pinned_list = made;
    *host = made->start;
    return leave(DRV_SUCCESS);
}

drv_result cuMemFreeHost(void *host) {
    ENTER_WITH_CONTEXT();
    drv_result forbidden = forbid_unsafe();
    if (forbidden)
        return leave(forbidden);
    struct allocation *taken = take(&pinned_list, host);
    if (!taken) {
        violation("cuMemFreeHost of an address that was not allocated");
        return leave(DRV_ERROR_INVALID_VALUE);
    }
    free(taken->start);
    free(taken);
    return leave(DRV_SUCCESS);
}

drv_result cuMemHostGetDevicePointer(drv_address *address, void *host, unsigned int flags) {
    ENTER_WITH_CONTEXT();
    const struct allocation *pinned = find(pinned_list, host, 1);
    if (flags || !pinned || !pinned->mapped)
        return leave(DRV_ERROR_INVALID_VALUE);
    *address = (drv_address)(uintptr_t)host | mapped_bit;
    return leave(DRV_SUCCESS);
}

void reset_memory(void) {
    while (device_list)
        free(take(&device_list, device_list->start));
    while (pinned_list) {
        free(pinned_list->start);
        free(take(&pinned_list, pinned_list->start));
    }
}

static drv_result pointer_attribute(void *value, drv_pointer_attribute attribute,
                                    const struct allocation *one, drv_address address,
                                    bool pinned) {
    unsigned char *host = fake_host(address);
    switch (attribute) {
    case DRV_POINTER_MEMORY_TYPE:
        *(unsigned *)value = pinned ? DRV_MEMORY_HOST : DRV_MEMORY_DEVICE;
        return DRV_SUCCESS;
    case DRV_POINTER_DEVICE_POINTER:
        *(drv_address *)value = (uintptr_t)host | (pinned ? mapped_bit : 0);
        return pinned && !one->mapped ? DRV_ERROR_INVALID_VALUE : DRV_SUCCESS;
    case DRV_POINTER_HOST_POINTER:
        *(void **)value = pinned ? host : NULL;
        return pinned ? DRV_SUCCESS : DRV_ERROR_INVALID_VALUE;
    case DRV_POINTER_CONTEXT:
        *(drv_context *)value = (drv_context)&fake.primary;
        return DRV_SUCCESS;
    case DRV_POINTER_DEVICE_ORDINAL:
        *(int *)value = 0;
        return DRV_SUCCESS;
    case DRV_POINTER_RANGE_START_ADDR:
        *(drv_address *)value = (uintptr_t)one->start | (address & mapped_bit);
        return DRV_SUCCESS;
    case DRV_POINTER_RANGE_SIZE:
        *(size_t *)value = one->bytes;
        return DRV_SUCCESS;
    }
    return DRV_ERROR_INVALID_VALUE;
}

drv_result cuPointerGetAttribute(void *value, drv_pointer_attribute attribute,
                                 drv_address address) {
    ENTER_WITH_CONTEXT();
    const struct allocation *device = NULL;
    if (!(address & mapped_bit))
        device = find(device_list, fake_host(address), 1);
    const struct allocation *pinned = find(pinned_list, fake_host(address), 1);
    if (!device && !pinned)
        return leave(DRV_ERROR_INVALID_VALUE);
    return leave(pointer_attribute(value, attribute, device ? device : pinned, address, !device));
}
