# SPDX-License-Identifier: Apache-2.0
# cmake -DTEST=program -DSMI=nvidia-smi -P run_on_gpu.cmake: runs the program where there is a GPU, else says that it did not.
set(found 1)
if(SMI)
  execute_process(COMMAND "${SMI}" -L RESULT_VARIABLE found OUTPUT_VARIABLE gpus ERROR_QUIET)
endif()
if(NOT found EQUAL 0 OR NOT gpus MATCHES "GPU 0")
  message("skipped: no GPU")
  return()
endif()
execute_process(COMMAND "${TEST}" RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${TEST} ended with ${result}")
endif()
