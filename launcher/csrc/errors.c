/* What went wrong: one line per thread, and the device's last words. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

static _Thread_local char last_error[512];

const char *duet_last_error(void) {
    return last_error;
}

int duet_fail(int status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

/* Errors after which the context is of no use: the driver repeats them for every later call. */
static bool is_final(drv_result result) {
    enum { ECC_UNCORRECTABLE = 214, NVLINK_UNCORRECTABLE = 220, LAUNCH_TIMEOUT = 702, ASSERT = 710,
           FIRST_FAULT = 714, LAST_FAULT = DRV_ERROR_LAUNCH_FAILED }; /* faults of a kernel */
    return result == DRV_ERROR_DEINITIALIZED || result == DRV_ERROR_ILLEGAL_ADDRESS ||
           result == DRV_ERROR_CONTEXT_IS_DESTROYED || (int)result == ECC_UNCORRECTABLE ||
           (int)result == NVLINK_UNCORRECTABLE || (int)result == LAUNCH_TIMEOUT ||
           (int)result == ASSERT || ((int)result >= FIRST_FAULT && (int)result <= LAST_FAULT);
}

int duet_driver_result(duet_device *device, drv_result result, const char *call) {
    if (result == DRV_SUCCESS)
        return DUET_OK;
    const char *name = NULL, *text = NULL;
    if (device->driver.cuGetErrorName(result, &name) != DRV_SUCCESS || name == NULL)
        name = "unknown error";
    if (device->driver.cuGetErrorString(result, &text) != DRV_SUCCESS || text == NULL)
        text = "";
    int status = result == DRV_ERROR_OUT_OF_MEMORY ? DUET_NO_MEMORY : DUET_DRIVER;
    duet_fail(status, "%s: %s (%d) %s", call, name, (int)result, text);
    if (is_final(result)) {
        duet_die(device, last_error);
        return DUET_DEAD;
    }
    return status;
}
