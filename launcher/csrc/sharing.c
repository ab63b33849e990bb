#include "sharing.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

/* Whoever comes late finds nothing to do, perhaps long after the call has returned: `work` is
 * touched with an item in hand only. */
struct job {
    duet_item *run;
    const void *work;
    size_t num_items;
    atomic_size_t next, done;
    atomic_int holders;
};

static void take_items(void *data) {
    struct job *job = data;
    size_t item;
    while ((item = atomic_fetch_add(&job->next, 1)) < job->num_items) {
        job->run(job->work, item);
        atomic_fetch_add(&job->done, 1);
    }
    if (atomic_fetch_sub(&job->holders, 1) == 1)
        free(job);
}

static size_t num_threads(const struct xla_call *call) {
    int64_t count = 1;
    struct xla_num_threads_arguments arguments = {sizeof arguments, NULL, call->context, &count};
    xla_error *error = call->api->num_threads(&arguments);
    if (error != NULL) {
        struct xla_error_destroy_arguments dropped = {sizeof dropped, NULL, error};
        call->api->destroy_error(&dropped);
    }
    return count < 1 ? 1 : (size_t)count;
}

/* False where there is nobody to share with. */
static bool share(const struct xla_call *call, duet_item *run, const void *work,
                  size_t num_items) {
    size_t helpers = num_threads(call) - 1;
    struct job *job = NULL;
    if (helpers == 0 || (job = malloc(sizeof *job)) == NULL)
        return false;
    helpers = helpers < num_items - 1 ? helpers : num_items - 1;
    *job = (struct job){.run = run, .work = work, .num_items = num_items,
                        .holders = (int)helpers + 2};
    for (size_t i = 0; i < helpers; i++) {
        struct xla_schedule_arguments arguments = {sizeof arguments, NULL, call->context,
                                                   take_items, job};
        xla_error *error = call->api->schedule(&arguments);
        if (error != NULL) {
            struct xla_error_destroy_arguments dropped = {sizeof dropped, NULL, error};
            call->api->destroy_error(&dropped);
            atomic_fetch_sub(&job->holders, 1);
        }
    }
    take_items(job);
    while (atomic_load(&job->done) < num_items) /* an item that another thread has in hand */
        sched_yield();
    if (atomic_fetch_sub(&job->holders, 1) == 1)
        free(job);
    return true;
}

void duet_share(const struct xla_call *call, duet_item *run, const void *work, size_t num_items) {
    bool is_shared = call != NULL && num_items > 1 && share(call, run, work, num_items);
    if (!is_shared)
        for (size_t item = 0; item < num_items; item++)
            run(work, item);
}
