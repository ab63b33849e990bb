/* Graphs as others see them (nodes, edges, parameters) and as they run (executable copies). */
#include <stdlib.h>
#include <string.h>

#include "fake_internal.h"

/* ---- looking at a graph ---------------------------------------------------------------------- */

/* Which of `count` things is reported in place `i`: the driver promises no order. */
static void shuffled(size_t *order, size_t count) {
    for (size_t i = 0; i < count; i++)
        order[i] = i;
    for (size_t i = count; fake.shuffle && i > 1; i--) {
        size_t j = mixed(fake.shuffle + i) % i, kept = order[j];
        order[j] = order[i - 1];
        order[i - 1] = kept;
    }
}

/* The driver's way with arrays: NULL asks for the length, and places in excess are cleared. */
drv_result cuGraphGetNodes(drv_graph handle, drv_graph_node *nodes, size_t *num_nodes) {
    ENTER();
    if (!is_live(handle, OBJECT_GRAPH, "graph"))
        return leave(DRV_ERROR_INVALID_VALUE);
    const struct nodes *all = &((struct graph *)handle)->nodes;
    size_t *order = new_memory(all->count * sizeof *order);
    shuffled(order, all->count);
    for (size_t i = 0; nodes && i < *num_nodes; i++)
        nodes[i] = i < all->count ? (drv_graph_node)all->at[order[i]] : NULL;
    if (!nodes || *num_nodes > all->count)
        *num_nodes = all->count;
    free(order);
    return leave(DRV_SUCCESS);
}

drv_result cuGraphGetEdges(drv_graph handle, drv_graph_node *from, drv_graph_node *to,
                           drv_edge_data *edges, size_t *num_edges) {
    ENTER();
    if (!is_live(handle, OBJECT_GRAPH, "graph") || !from != !to)
        return leave(DRV_ERROR_INVALID_VALUE);
    const struct graph *graph = (struct graph *)handle;
    size_t *order = new_memory(graph->num_edges * sizeof *order);
    shuffled(order, graph->num_edges);
    drv_result result = DRV_SUCCESS;
    for (size_t i = 0; from && i < *num_edges; i++) {
        struct edge none = {0};
        struct edge edge = i < graph->num_edges ? graph->edges[order[i]] : none;
        from[i] = (drv_graph_node)edge.from;
        to[i] = (drv_graph_node)edge.to;
        if (edges)
            edges[i] = edge.data;
        else if (edge.data.type) /* what the caller leaves no room for must not be lost */
            result = DRV_ERROR_LOSSY_QUERY;
    }
    if (!from || *num_edges > graph->num_edges)
        *num_edges = graph->num_edges;
    free(order);
    return leave(result);
}

static struct node *live_node(drv_graph_node handle) {
    return is_live(handle, OBJECT_NODE, "graph node") ? (struct node *)handle : NULL;
}

/* A node of this type, or NULL. */
static struct node *node_of(drv_graph_node handle, drv_node_type type) {
    struct node *node = live_node(handle);
    return node && node->type == type && node->work.kind != WORK_NOTHING ? node : NULL;
}

drv_result cuGraphNodeGetType(drv_graph_node handle, drv_node_type *type) {
    ENTER();
    struct node *node = live_node(handle);
    if (!node)
        return leave(DRV_ERROR_INVALID_VALUE);
    *type = node->type;
    return leave(DRV_SUCCESS);
}

drv_result cuGraphKernelNodeGetParams(drv_graph_node handle, drv_kernel_params *params) {
    ENTER();
    struct node *node = node_of(handle, DRV_NODE_KERNEL);
    if (!node)
        return leave(DRV_ERROR_INVALID_VALUE);
    struct launch *launch = node->work.launch;
    const drv_launch_config *config = &launch->config;
    *params = (drv_kernel_params){
        .function = (drv_function)launch->function,
        .grid_x = config->grid_x,
        .grid_y = config->grid_y,
        .grid_z = config->grid_z,
        .block_x = config->block_x,
        .block_y = config->block_y,
        .block_z = config->block_z,
        .shared_bytes = config->shared_bytes,
        .params = launch->uses_extra ? NULL : launch->params,
        .extra = launch->uses_extra ? launch->extra : NULL,
        .kernel = (drv_kernel)launch->function->kernel,
        .context = (drv_context)launch->context,
    };
    return leave(DRV_SUCCESS);
}

/* Only what shows a rule: a new context, with the same function and arguments. */
drv_result cuGraphKernelNodeSetParams(drv_graph_node handle, const drv_kernel_params *params) {
    ENTER();
    struct node *node = node_of(handle, DRV_NODE_KERNEL);
    if (!node)
        return leave(DRV_ERROR_INVALID_VALUE);
    if (params->kernel && !params->function) /* else the driver does not look at it */
        node->work.launch->context = (struct context *)params->context;
    return leave(DRV_SUCCESS);
}

static bool is_node_attribute(drv_attribute_id id) {
    switch (id) {
    case DRV_ATTRIBUTE_ACCESS_POLICY_WINDOW:
    case DRV_ATTRIBUTE_COOPERATIVE:
    case DRV_ATTRIBUTE_CLUSTER_DIMENSION:
    case DRV_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
    case DRV_ATTRIBUTE_PRIORITY:
    case DRV_ATTRIBUTE_MEM_SYNC_DOMAIN_MAP:
    case DRV_ATTRIBUTE_MEM_SYNC_DOMAIN:
    case DRV_ATTRIBUTE_PREFERRED_CLUSTER_DIMENSION:
    case DRV_ATTRIBUTE_DEVICE_UPDATABLE_KERNEL_NODE:
    case DRV_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
        return true;
    default: /* programmatic serialisation, for one, becomes the type of an edge */
        return false;
    }
}

drv_result cuGraphKernelNodeGetAttribute(drv_graph_node handle, drv_attribute_id id,
                                         drv_attribute_value *value) {
    ENTER();
    struct node *node = node_of(handle, DRV_NODE_KERNEL);
    if (!node || !is_node_attribute(id))
        return leave(DRV_ERROR_INVALID_VALUE);
    *value = node->work.launch->attribute[id];
    return leave(DRV_SUCCESS);
}

drv_result cuGraphMemcpyNodeGetParams(drv_graph_node handle, drv_copy_3d *params) {
    ENTER();
    struct node *node = node_of(handle, DRV_NODE_MEMCPY);
    if (!node)
        return leave(DRV_ERROR_INVALID_VALUE);
    *params = node->work.copy;
    return leave(DRV_SUCCESS);
}

drv_result cuGraphMemsetNodeGetParams(drv_graph_node handle, drv_memset_params *params) {
    ENTER();
    struct node *node = node_of(handle, DRV_NODE_MEMSET);
    if (!node)
        return leave(DRV_ERROR_INVALID_VALUE);
    *params = node->work.set;
    return leave(DRV_SUCCESS);
}

/* ---- the life of graphs ---------------------------------------------------------------------- */

void free_graph(struct graph *graph) {
    free(graph->nodes.at);
    free(graph->edges);
    graph->nodes = (struct nodes){0};
    graph->edges = NULL;
    graph->num_edges = 0;
}

/* Frees what the nodes own: arguments that somebody still reads are then a use after free. The
 * nodes themselves stay, as all objects do. */
drv_result cuGraphDestroy(drv_graph handle) {
    ENTER();
    if (!is_live(handle, OBJECT_GRAPH, "graph"))
        return leave(DRV_ERROR_INVALID_VALUE);
    struct graph *graph = (struct graph *)handle;
    for (size_t i = 0; i < graph->nodes.count; i++) {
        graph->nodes.at[i]->object.live = false;
        free_work(&graph->nodes.at[i]->work);
    }
    free_graph(graph);
    graph->object.live = false;
    return leave(DRV_SUCCESS);
}

static size_t index_of(const struct nodes *nodes, const struct node *node) {
    size_t i = 0;
    while (nodes->at[i] != node)
        i++;
    return i;
}

drv_result cuGraphInstantiateWithFlags(drv_graph_exec *handle, drv_graph graph_handle,
                                       unsigned long long flags) {
    ENTER_WITH_CONTEXT();
    if (!is_live(graph_handle, OBJECT_GRAPH, "graph") || flags > 15)
        return leave(DRV_ERROR_INVALID_VALUE);
    const struct graph *graph = (struct graph *)graph_handle;
    struct exec *exec = new_object(sizeof *exec, OBJECT_EXEC);
    exec->num_works = graph->nodes.count;
    exec->works = new_memory(exec->num_works * sizeof *exec->works);
    for (size_t i = 0; i < exec->num_works; i++)
        exec->works[i] = copy_of_work(&graph->nodes.at[i]->work);
    exec->num_edges = graph->num_edges;
    exec->edges = new_memory(exec->num_edges * sizeof *exec->edges);
    for (size_t i = 0; i < exec->num_edges; i++) {
        exec->edges[i][0] = index_of(&graph->nodes, graph->edges[i].from);
        exec->edges[i][1] = index_of(&graph->nodes, graph->edges[i].to);
    }
    *handle = (drv_graph_exec)exec;
    return leave(DRV_SUCCESS);
}

void free_exec(struct exec *exec) {
    for (size_t i = 0; i < exec->num_works; i++)
        free_work(&exec->works[i]);
    free(exec->works);
    free(exec->edges);
}

bool exec_uses(const struct exec *exec, const struct context *context) {
    for (size_t i = 0; i < exec->num_works; i++)
        if (exec->works[i].kind == WORK_KERNEL && exec->works[i].launch->context == context)
            return true;
    return false;
}

/* One still running runs on: as in the driver, it is taken apart when it has finished (here: by
 * fake_reset). */
drv_result cuGraphExecDestroy(drv_graph_exec handle) {
    ENTER();
    if (!is_live(handle, OBJECT_EXEC, "executable graph"))
        return leave(DRV_ERROR_INVALID_VALUE);
    ((struct exec *)handle)->object.live = false;
    return leave(DRV_SUCCESS);
}

drv_result cuGraphUpload(drv_graph_exec handle, drv_stream stream_handle) {
    ENTER_WITH_CONTEXT();
    struct stream *stream = live_stream(stream_handle);
    if (!stream || !is_live(handle, OBJECT_EXEC, "executable graph"))
        return leave(stream ? DRV_ERROR_INVALID_VALUE : DRV_ERROR_INVALID_HANDLE);
    return leave(forbid_in_capture(stream));
}

drv_result cuGraphLaunch(drv_graph_exec handle, drv_stream stream_handle) {
    ENTER_WITH_CONTEXT();
    struct stream *stream = live_stream(stream_handle);
    if (!stream || !is_live(handle, OBJECT_EXEC, "executable graph"))
        return leave(stream ? DRV_ERROR_INVALID_VALUE : DRV_ERROR_INVALID_HANDLE);
    if (stream->capture) /* becomes a graph within the graph; the double does not run those */
        return leave(submit(stream, (struct work){.kind = WORK_NOTHING}, DRV_NODE_GRAPH));
    struct exec *exec = (struct exec *)handle;
    struct operation *operation = new_memory(sizeof *operation);
    operation->work.kind = WORK_GRAPH;
    operation->exec = exec;
    operation->turn = exec->launched++;
    operation->left = exec->num_works;
    operation->done = new_memory(exec->num_works * sizeof *operation->done);
    operation->missing = new_memory(exec->num_works * sizeof *operation->missing);
    for (size_t i = 0; i < exec->num_edges; i++)
        operation->missing[exec->edges[i][1]]++;
    append(stream, operation);
    return leave(DRV_SUCCESS);
}
