/* The marker, called with frames like XLA's. */
#include "harness.h"

struct xla_error {
    char message[300];
    int code;
};

static struct xla_error last_made, stream_refused = {"no stream today", 14};
static bool refuse_stream;
static drv_address cell;
static void *adder;

static xla_error *create_error(struct xla_error_arguments *arguments) {
    CHECK(arguments->struct_size == sizeof *arguments && arguments->message);
    strncpy(last_made.message, arguments->message, sizeof last_made.message - 1);
    last_made.code = arguments->code;
    return &last_made;
}

static int the_context; /* its address is passed through */

static xla_error *get_stream(struct xla_stream_arguments *arguments) {
    CHECK(arguments->struct_size == sizeof *arguments && arguments->context == &the_context);
    if (refuse_stream)
        return &stream_refused;
    arguments->stream = xla;
    return NULL;
}

/* One call frame and all that it points to. */
struct frame {
    struct xla_api api;
    struct xla_call call;
    int64_t program;
    struct xla_scalar scalar;
    struct xla_text name;
    struct xla_text *names[1];
    int attribute_types[1], argument_types[2];
    void *attributes[1], *arguments[2];
    struct xla_buffer buffers[2];
};

static void fill(struct frame *frame, int64_t program, int stage) {
    *frame = (struct frame){.program = program};
    frame->api = (struct xla_api){.struct_size = sizeof(struct xla_api) + 14 * sizeof(void *),
                                  .version = {sizeof(struct xla_version), NULL, 0, 4},
                                  .create_error = create_error, .get_stream = get_stream};
    frame->scalar = (struct xla_scalar){XLA_S64, &frame->program};
    frame->name = (struct xla_text){"programs_are_many", 7};
    frame->names[0] = &frame->name;
    frame->attribute_types[0] = XLA_SCALAR_ATTRIBUTE;
    frame->attributes[0] = &frame->scalar;
    for (size_t i = 0; i < 2; i++) {
        frame->buffers[i] = (struct xla_buffer){.struct_size = sizeof(struct xla_buffer),
                                                .data = (void *)(uintptr_t)(cell + 8 * i)};
        frame->arguments[i] = &frame->buffers[i];
        frame->argument_types[i] = 1;
    }
    frame->call = (struct xla_call){
        .struct_size = offsetof(struct xla_call, future), .api = &frame->api,
        .context = &the_context, .stage = stage,
        .arguments = {sizeof(struct xla_list), NULL, 2, frame->argument_types, frame->arguments},
        .results = {sizeof(struct xla_list), NULL, 0, NULL, NULL},
        .attributes = {sizeof(struct xla_attributes), NULL, 1, frame->attribute_types,
                       frame->names, frame->attributes}};
}

static xla_error *mark(int64_t program, int stage) {
    struct frame frame;
    fill(&frame, program, stage);
    return duet_marker(&frame.call);
}

static void prepare(void) {
    open_device();
    cell = new_memory(16);
    adder = new_add("add", FAKE_MODULE);
}

static void a_query_is_answered_with_the_version(void) {
    struct xla_metadata metadata = {.struct_size = sizeof metadata,
                                    .version = {sizeof(struct xla_version), NULL, 9, 9},
                                    .traits = 77, .state_type = 77};
    struct xla_metadata_extension extension = {
        .base = {sizeof extension, XLA_METADATA_EXTENSION, NULL}, .metadata = &metadata};
    struct frame frame;
    fill(&frame, 1, XLA_EXECUTE);
    frame.call = (struct xla_call){.struct_size = sizeof frame.call, .extension = &extension.base,
                                   .api = &frame.api}; /* all that XLA gives when it asks */
    CHECK(duet_marker(&frame.call) == NULL);
    CHECK(metadata.version.major == 0 && metadata.version.minor <= 4);
    CHECK(metadata.version.minor >= 0);
    CHECK(metadata.traits == 0); /* not for command buffers: those would hide its stages */
    CHECK(metadata.state_type == 0 || metadata.state_type == 77);
}

static void another_version_is_refused(void) {
    struct frame frame;
    fill(&frame, 1, XLA_EXECUTE);
    frame.api.version.major = 1;
    xla_error *error = duet_marker(&frame.call);
    CHECK(error && error->code == XLA_FAILED_PRECONDITION && strstr(error->message, "jax"));
    fill(&frame, 1, XLA_EXECUTE);
    frame.call.struct_size = offsetof(struct xla_call, attributes);
    CHECK(duet_marker(&frame.call) == &last_made);
}

static void a_program_that_is_no_int64_is_refused(void) {
    struct frame frame;
    for (int variant = 0; variant < 2; variant++) {
        fill(&frame, 1, XLA_INITIALIZE);
        if (variant == 0)
            frame.attribute_types[0] = 4;
        if (variant == 1)
            frame.scalar.type = XLA_S64 - 1;
        xla_error *error = duet_marker(&frame.call);
        CHECK(error == &last_made);
        CHECK(error->code == XLA_FAILED_PRECONDITION && strstr(error->message, "program"));
    }
}

/* Whole names count, and a marker without the attribute is of program 0. */
static void a_marker_without_the_attribute_is_not_of_the_armed_program(void) {
    struct frame frame;
    prepare();
    OK(duet_capture_arm(device, 1));
    enter_primary();
    for (int variant = 0; variant < 3; variant++) {
        fill(&frame, 1, XLA_INITIALIZE);
        if (variant == 0)
            frame.call.attributes.size = 0;
        if (variant == 1)
            frame.name.length = 6;
        if (variant == 2)
            frame.name = (struct xla_text){"programs", 8};
        duet_marker(&frame.call);
        CHECK(fake_calls("cuStreamBeginCapture") == 0);
    }
    leave_primary();
    OK(duet_capture_abort(device));
}

static void runs_not_armed_do_nothing(void) {
    prepare();
    enter_primary();
    for (int stage = 0; stage < 4; stage++)
        CHECK(mark(3, stage) == NULL);
    leave_primary();
    CHECK(fake_calls("cuStreamBeginCapture") == 0);
}

static void initialize_begins_and_execute_ends(void) {
    duet_program *program = NULL;
    size_t count = 0;
    prepare();
    OK(duet_capture_arm(device, -3));
    enter_primary();
    CHECK(mark(-3, 0) == NULL && mark(-3, 1) == NULL && fake_calls("cuStreamBeginCapture") == 0);
    CHECK(mark(-3, XLA_INITIALIZE) == NULL);
    drv_capture_status status = DRV_CAPTURE_NONE;
    CU(cu.cuStreamIsCapturing(xla, &status));
    CHECK(status == DRV_CAPTURE_ACTIVE);
    enqueue_add(adder, cell, 1);
    CHECK(mark(-3, XLA_EXECUTE) == NULL);
    CU(cu.cuStreamIsCapturing(xla, &status));
    CHECK(status == DRV_CAPTURE_NONE);
    leave_primary();
    OK(duet_capture_take(device, -3, &program));
    const duet_address *outputs = duet_program_outputs(program, &count);
    CHECK(count == 2 && outputs[0] == cell && outputs[1] == cell + 8);
    CHECK(duet_program_census(program).kernels == 1);
    discard(program);
}

static void the_capture_lets_xla_allocate(void) {
    duet_program *program = NULL;
    drv_address extra = 0;
    prepare();
    OK(duet_capture_arm(device, 3));
    enter_primary();
    CHECK(mark(3, XLA_INITIALIZE) == NULL);
    CU(cu.cuMemAlloc(&extra, 64)); /* only while a RELAXED capture */
    CU(cu.cuMemFree(extra));
    CHECK(mark(3, XLA_EXECUTE) == NULL);
    leave_primary();
    OK(duet_capture_take(device, 3, &program));
    discard(program);
}

static void no_stream_is_xlas_own_error(void) {
    prepare();
    OK(duet_capture_arm(device, 3));
    refuse_stream = true;
    enter_primary();
    CHECK(mark(4, XLA_INITIALIZE) == NULL); /* another program's is not even asked for it */
    CHECK(mark(3, XLA_INITIALIZE) == &stream_refused);
    leave_primary();
    refuse_stream = false;
    duet_program *program = NULL;
    REFUSED(STATE, NULL, duet_capture_take(device, 3, &program));
    OK(duet_capture_abort(device));
    CHECK(fake_calls("cuStreamBeginCapture") == 0);
}

static void a_capture_that_cannot_begin_is_xlas_error(void) {
    prepare();
    OK(duet_capture_arm(device, 3));
    fake_fail("cuStreamBeginCapture", 1, DRV_ERROR_UNKNOWN);
    enter_primary();
    xla_error *error = mark(3, XLA_INITIALIZE);
    leave_primary();
    CHECK(error == &last_made && error->code == XLA_INTERNAL);
    CHECK(strstr(error->message, "cuStreamBeginCapture"));
    OK(duet_capture_abort(device));
}

static void a_capture_that_cannot_end_is_xlas_error(void) {
    prepare();
    OK(duet_capture_arm(device, 3));
    enter_primary();
    CHECK(mark(3, XLA_INITIALIZE) == NULL);
    CHECK(cu.cuStreamSynchronize(xla) != DRV_SUCCESS);
    xla_error *error = mark(3, XLA_EXECUTE);
    leave_primary();
    CHECK(error == &last_made && error->code == XLA_INTERNAL && *error->message);
    OK(duet_capture_abort(device));
}

static void another_program_in_between_does_not_end_the_capture(void) {
    duet_program *program = NULL;
    prepare();
    OK(duet_capture_arm(device, 3));
    enter_primary();
    CHECK(mark(3, XLA_INITIALIZE) == NULL);
    xla_error *begun = mark(4, XLA_INITIALIZE), *ended = mark(4, XLA_EXECUTE);
    enqueue_add(adder, cell, 1);
    mark(3, XLA_EXECUTE);
    leave_primary();
    int taken = duet_capture_take(device, 3, &program);
    CHECK(begun || ended || taken < 0 || duet_program_census(program).kernels == 1);
    discard(program);
    duet_capture_abort(device);
}

SUITE(marker_tests,
      TEST(a_query_is_answered_with_the_version),
      TEST(another_version_is_refused),
      TEST(a_program_that_is_no_int64_is_refused),
      TEST(a_marker_without_the_attribute_is_not_of_the_armed_program),
      TEST(runs_not_armed_do_nothing),
      TEST(initialize_begins_and_execute_ends),
      TEST(the_capture_lets_xla_allocate),
      TEST(no_stream_is_xlas_own_error),
      TEST(a_capture_that_cannot_begin_is_xlas_error),
      TEST(a_capture_that_cannot_end_is_xlas_error),
      TEST(another_program_in_between_does_not_end_the_capture));
