/* The part of DCMI that a dashboard needs, as its API reference declares it: card 0 has two NPUs, card 1 has one. */
#include <string.h>

struct dcmi_hbm_info {
  unsigned long long memory_size;
  unsigned int freq;
  unsigned long long memory_usage;
  int temp;
  unsigned int bandwith_util_rate;
};
struct dcmi_chip_info {
  unsigned char chip_type[32], chip_name[32], chip_ver[32];
  unsigned int aicore_cnt;
};
struct dcmi_die_id {
  unsigned int soc_die[5];
};
struct dcmi_proc_mem_info {
  int proc_id;
  unsigned long proc_mem_usage;
};

static int initialized = 0;

int dcmi_init(void) {
  initialized = 1;
  return 0;
}

int dcmi_get_card_list(int* card_num, int* card_list, int list_len) {
  if (!initialized || list_len < 2) return -8005;
  *card_num = 2;
  card_list[0] = 0;
  card_list[1] = 1;
  return 0;
}

int dcmi_get_device_id_in_card(int card, int* device_id_max, int* mcu_id, int* cpu_id) {
  *device_id_max = card == 0 ? 2 : 1;
  *mcu_id = *cpu_id = -1;
  return 0;
}

int dcmi_get_device_logic_id(int* logic_id, int card, int device) {
  *logic_id = 2 * card + device;
  return 0;
}

int dcmi_get_device_hbm_info(int card, int device, struct dcmi_hbm_info* info) {
  *info = (struct dcmi_hbm_info){65536, 1600, 1024, 41, 3};
  return 0;
}

int dcmi_get_device_chip_info(int card, int device, struct dcmi_chip_info* info) {
  memset(info, 0, sizeof *info);
  strcpy((char*)info->chip_type, "Ascend");
  strcpy((char*)info->chip_name, "910B3");
  info->aicore_cnt = 20;
  return 0;
}

int dcmi_get_device_die_v2(int card, int device, int input_type, struct dcmi_die_id* die) {
  if (input_type != 1) return -8001;
  *die = (struct dcmi_die_id){{card, device, 2, 3, 4}};
  return 0;
}

int dcmi_get_device_utilization_rate(int card, int device, int input_type, unsigned int* rate) {
  if (input_type != 2) return -8001;
  *rate = 40 + 2 * card + device;
  return 0;
}

int dcmi_get_device_power_info(int card, int device, int* tenths_of_watts) {
  *tenths_of_watts = 935;
  return 0;
}

int dcmi_get_device_temperature(int card, int device, int* celsius) {
  *celsius = 39;
  return 0;
}

int dcmi_get_device_resource_info(int card, int device, struct dcmi_proc_mem_info* processes, int* count) {
  *count = 1;
  processes[0] = (struct dcmi_proc_mem_info){4711 + 2 * card + device, 512ul << 20};
  return 0;
}
