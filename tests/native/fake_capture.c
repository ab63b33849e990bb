/* Stream capture: what streams are asked to do becomes nodes of a graph instead of being done.
 *
 * A capture starts on one stream; another joins by waiting for an event recorded in the capture,
 * and must have been waited for in turn before the capture ends. A mistake makes the capture
 * invalid: all that is asked of its streams fails until the origin ends it, without a graph. */
#include <stdlib.h>
#include <string.h>

#include "fake_internal.h"

void add_node(struct nodes *nodes, struct node *node) {
    nodes->at = realloc(nodes->at, (nodes->count + 1) * sizeof *nodes->at);
    if (!nodes->at)
        abort();
    nodes->at[nodes->count++] = node;
}

static bool has_node(const struct nodes *nodes, const struct node *node) {
    for (size_t i = 0; i < nodes->count; i++)
        if (nodes->at[i] == node)
            return true;
    return false;
}

static void merge_nodes(struct nodes *to, const struct nodes *from) {
    for (size_t i = 0; i < from->count; i++)
        if (!has_node(to, from->at[i]))
            add_node(to, from->at[i]);
}

void copy_nodes(struct nodes *to, const struct nodes *from) {
    to->count = 0;
    merge_nodes(to, from);
}

void invalidate(struct capture *capture) {
    capture->invalid = true;
}

drv_result check_capture(struct stream *stream) {
    bool invalid = stream->capture && stream->capture->invalid;
    return invalid ? DRV_ERROR_STREAM_CAPTURE_INVALIDATED : DRV_SUCCESS;
}

drv_result forbid_in_capture(struct stream *stream) {
    if (!stream->capture)
        return DRV_SUCCESS;
    drv_result broken = check_capture(stream);
    invalidate(stream->capture);
    return broken ? broken : DRV_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

drv_result forbid_unsafe(void) {
    drv_result result = DRV_SUCCESS;
    for (struct object *object = fake.objects; object; object = object->next) {
        struct capture *capture = (struct capture *)object;
        if (object->kind != OBJECT_CAPTURE || !object->live || capture->mode == DRV_CAPTURE_RELAXED)
            continue;
        if (capture->mode == DRV_CAPTURE_THREAD_LOCAL &&
            !pthread_equal(capture->thread, pthread_self()))
            continue;
        invalidate(capture);
        result = DRV_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return result;
}

/* ---- nodes ----------------------------------------------------------------------------------- */

static void add_edge(struct graph *graph, struct node *from, struct node *to, bool programmatic) {
    graph->edges = realloc(graph->edges, (graph->num_edges + 1) * sizeof *graph->edges);
    if (!graph->edges)
        abort();
    struct edge *edge = &graph->edges[graph->num_edges++];
    *edge = (struct edge){.from = from, .to = to};
    if (programmatic && from->type == DRV_NODE_KERNEL) {
        edge->data.from_port = 1; /* the port of "programmatic" completion */
        edge->data.type = DRV_DEPENDENCY_PROGRAMMATIC;
    }
}

struct node *capture_work(struct stream *stream, struct work work, drv_node_type type) {
    struct graph *graph = stream->capture->graph;
    struct node *node = new_object(sizeof *node, OBJECT_NODE);
    node->type = type;
    node->work = work;
    add_node(&graph->nodes, node);
    for (size_t i = 0; i < stream->tails.count; i++)
        add_edge(graph, stream->tails.at[i], node, stream->programmatic);
    stream->tails.count = 0;
    add_node(&stream->tails, node);
    return node;
}

int fake_capture_node(drv_stream handle, drv_node_type type) {
    pthread_mutex_lock(&fake.lock);
    struct stream *stream = live_stream(handle);
    bool capturing = stream && stream->capture && !stream->capture->invalid;
    if (capturing)
        capture_work(stream, (struct work){.kind = WORK_NOTHING}, type);
    pthread_mutex_unlock(&fake.lock);
    return capturing ? 0 : -1;
}

/* ---- events ---------------------------------------------------------------------------------- */

drv_result capture_record(struct stream *stream, struct event *event) {
    drop_mark(event->mark);
    event->mark = NULL;
    event->capture = stream->capture;
    copy_nodes(&event->tails, &stream->tails);
    return DRV_SUCCESS;
}

drv_result capture_wait(struct stream *stream, struct event *event) {
    if (!event->capture && !event->mark)
        return DRV_SUCCESS; /* never recorded */
    if (!event->capture) { /* recorded in real work, which a graph cannot wait for */
        invalidate(stream->capture);
        return DRV_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (!event->capture->object.live)
        return DRV_ERROR_CAPTURED_EVENT;
    if (event->capture->invalid)
        return DRV_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (stream->capture && stream->capture != event->capture) {
        invalidate(stream->capture);
        invalidate(event->capture);
        return DRV_ERROR_STREAM_CAPTURE_MERGE;
    }
    stream->capture = event->capture;
    merge_nodes(&stream->tails, &event->tails);
    return DRV_SUCCESS;
}

/* ---- begin and end --------------------------------------------------------------------------- */

drv_result cuStreamBeginCapture(drv_stream handle, drv_capture_mode mode) {
    ENTER_WITH_CONTEXT();
    struct stream *stream = live_stream(handle);
    if (!stream || stream->capture)
        return leave(stream ? DRV_ERROR_ILLEGAL_STATE : DRV_ERROR_INVALID_HANDLE);
    struct capture *capture = new_object(sizeof *capture, OBJECT_CAPTURE);
    capture->graph = new_object(sizeof *capture->graph, OBJECT_GRAPH);
    capture->graph->object.live = false; /* until somebody is given it */
    capture->origin = stream;
    capture->mode = mode;
    capture->thread = pthread_self();
    stream->capture = capture;
    stream->tails.count = 0;
    return leave(DRV_SUCCESS);
}

/* All that `nodes` depend on, themselves included. */
static struct nodes with_ancestors(const struct graph *graph, const struct nodes *nodes) {
    struct nodes all = {0};
    merge_nodes(&all, nodes);
    for (size_t i = 0; i < all.count; i++)
        for (size_t e = 0; e < graph->num_edges; e++)
            if (graph->edges[e].to == all.at[i] && !has_node(&all, graph->edges[e].from))
                add_node(&all, graph->edges[e].from);
    return all;
}

/* Takes every stream out of the capture; says whether one was not waited for by the origin. */
static bool release_streams(struct capture *capture) {
    struct nodes joined = with_ancestors(capture->graph, &capture->origin->tails);
    bool unjoined = false;
    for (struct object *object = fake.objects; object; object = object->next) {
        struct stream *stream = (struct stream *)object;
        if (object->kind != OBJECT_STREAM || stream->capture != capture)
            continue;
        for (size_t i = 0; i < stream->tails.count; i++)
            unjoined |= !has_node(&joined, stream->tails.at[i]);
        stream->capture = NULL;
        stream->tails.count = 0;
    }
    free(joined.at);
    return unjoined;
}

static drv_result check_end(struct stream *stream) {
    struct capture *capture = stream->capture;
    if (!capture)
        return DRV_ERROR_ILLEGAL_STATE;
    if (capture->origin != stream) {
        invalidate(capture);
        return DRV_ERROR_STREAM_CAPTURE_UNMATCHED;
    }
    if (capture->mode != DRV_CAPTURE_RELAXED && !pthread_equal(capture->thread, pthread_self()))
        return DRV_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    return DRV_SUCCESS;
}

drv_result cuStreamEndCapture(drv_stream handle, drv_graph *graph) {
    ENTER_WITH_CONTEXT();
    *graph = NULL;
    struct stream *stream = live_stream(handle);
    if (!stream)
        return leave(DRV_ERROR_INVALID_HANDLE);
    struct capture *capture = stream->capture;
    drv_result refused = check_end(stream);
    if (refused)
        return leave(refused);
    bool unjoined = release_streams(capture);
    capture->object.live = false;
    if (capture->invalid)
        return leave(DRV_ERROR_STREAM_CAPTURE_INVALIDATED);
    if (unjoined)
        return leave(DRV_ERROR_STREAM_CAPTURE_UNJOINED);
    capture->graph->object.live = true;
    *graph = (drv_graph)capture->graph;
    return leave(DRV_SUCCESS);
}

drv_result cuStreamIsCapturing(drv_stream handle, drv_capture_status *status) {
    ENTER_WITH_CONTEXT();
    struct stream *stream = live_stream(handle);
    if (!stream)
        return leave(DRV_ERROR_INVALID_HANDLE);
    *status = DRV_CAPTURE_NONE;
    if (stream->capture)
        *status = stream->capture->invalid ? DRV_CAPTURE_INVALIDATED : DRV_CAPTURE_ACTIVE;
    return leave(DRV_SUCCESS);
}
